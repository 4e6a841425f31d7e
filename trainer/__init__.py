"""What runs where the GPUs are: reads a job's config, trains, writes a verified model. Knows no Prefect and no cloud control API."""
