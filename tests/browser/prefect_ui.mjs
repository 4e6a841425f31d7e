// Drives Prefect's own UI as a person does. Arguments: one JSON object. Prints one JSON line per step, which the pytest test reads.
import { createRequire } from "node:module";

const given = JSON.parse(process.argv[2]);
const { chromium } = createRequire(`${given.modules}/`)("playwright-core");
const tell = (step, facts = {}) => console.log(JSON.stringify({ step, at: Date.now() / 1000, ...facts }));

const browser = await chromium.launchPersistentContext(given.profile, {
  executablePath: given.chromium,
  headless: true,
  // As root in a container there is no sandbox, and /dev/shm is small.
  args: ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"],
  viewport: { width: 1440, height: 900 },
});
const page = await browser.newPage();
page.setDefaultTimeout(60_000);
const picture = (name) => page.screenshot({ path: `${given.pictures}/${name}.png` });

// A field of the form: the innermost box that holds its label and one input.
const field = (label) =>
  page
    .locator(".p-label", { has: page.locator(".p-label__text, .p-label__label, label", { hasText: label }) })
    .filter({ has: page.locator("input, textarea") })
    .last();
const input = (label) => field(label).locator("input, textarea").first();

async function openForm() {
  await page.goto(`${given.url}/deployments/deployment/${given.deployment}/run`);
  await page.getByText("Parameters", { exact: true }).first().waitFor();
  await input(/^Dataset/).waitFor();
}

async function fill(values) {
  for (const [label, value] of Object.entries(values)) {
    await input(new RegExp(`^${label}`)).fill(String(value));
  }
}

// Fills and sends the form. The page can put its defaults over what was typed before it had loaded, and then refuses the form: typed again, as a person would.
async function submit(values) {
  const creates = (message) => message.url().includes("/create_flow_run");
  for (let attempt = 1; ; attempt++) {
    await fill(values);
    const sent = page.waitForRequest(creates, { timeout: 15_000 }).catch(() => null);
    await page.getByRole("button", { name: "Submit" }).click();
    const answer = await (await sent)?.response();
    if (answer?.ok()) return (await answer.json()).id;
    const why = answer ? `${answer.status()} ${await answer.text()}` : await page.locator("body").innerText();
    if (answer || attempt === 3) throw new Error(`no run was created: ${why}`);
    tell("typed-again", { page: why });
  }
}

async function openRun(id, tab = "Logs") {
  await page.goto(`${given.url}/runs/flow-run/${id}`);
  await page.getByText(tab, { exact: true }).first().click();
}

async function openReport(name) {
  await page.getByText("training-report", { exact: true }).last().click();
  await page.waitForURL(/artifacts\/artifact\//);
  await page.getByRole("heading", { level: 1 }).first().waitFor();
  await page.waitForTimeout(1000);
  await picture(name);
}

const steps = {
  async refuse() {
    await openForm();
    await picture("form");
    await fill({ ...given.fields, Epochs: 0 });
    await page.getByRole("button", { name: "Submit" }).click();
    const refusal = page.getByText(/config\.epochs/).last();
    await refusal.waitFor();
    await input(/^Epochs/).scrollIntoViewIfNeeded();
    await picture("refused");
    tell("refused", { text: await refusal.innerText(), url: page.url() });
  },
  async train() {
    await openForm();
    const id = await submit(given.fields);
    tell("submitted", { id });
    await openRun(id);
    await page.getByText(/^epoch \d+\/\d+$/).first().waitFor({ timeout: 120_000 });
    await page.getByText("Artifacts", { exact: true }).first().click();
    for (const key of ["training-progress", "training-metrics", "training-report"]) {
      await page.getByText(key, { exact: true }).last().waitFor();
    }
    await picture("running");
    tell("running", { header: await page.locator("body").innerText() });
    await page.getByText("Completed", { exact: true }).first().waitFor({ timeout: 120_000 });
    await openRun(id, "Artifacts");
    await page.getByText("trained-model", { exact: true }).last().waitFor();
    await page.waitForTimeout(1000);
    await picture("finished");
    tell("finished", { header: await page.locator("body").innerText() });
    await openReport("report");
    tell("report", { text: await page.locator("body").innerText() });
  },
  async cancel() {
    await openForm();
    const id = await submit({ ...given.fields, Epochs: 5000 });
    tell("submitted-long", { id });
    await openRun(id);
    await page.getByText(/^epoch \d+\/\d+$/).first().waitFor({ timeout: 120_000 });
    await page.getByRole("button", { name: "Cancel" }).click();
    await page.getByRole("button", { name: "Confirm" }).click();
    tell("cancelled", { id });
    await page.getByText("Cancelled", { exact: true }).first().waitFor({ timeout: 60_000 });
    await page.waitForTimeout(1000);
    await openRun(id, "Artifacts");
    await page.getByText("training-report", { exact: true }).last().waitFor();
    await page.waitForTimeout(1000);
    await picture("cancelled");
    await openReport("cancelled-report");
    tell("cancelled-report", { text: await page.locator("body").innerText() });
  },
};

try {
  for (const step of given.steps) {
    await steps[step]();
  }
} catch (error) {
  await picture("failed-here").catch(() => {});
  tell("error", { message: String(error) });
  process.exitCode = 1;
} finally {
  await browser.close();
}
