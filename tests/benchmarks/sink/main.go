// A small S3 server for benchmarks: objects in memory, loopback only, checksums verified where a client sends them.
//
// It takes any credentials and does not look at signatures; a payload hash that is signed is compared. ETags are
// counters, not MD5, so that no client pays for a hash that the server alone asks for.
// GET /_sink tells what was counted, POST /_sink starts counting anew, DELETE /_sink drops all objects as well.
package main

import (
	"bufio"
	"bytes"
	"crypto/md5"
	"crypto/sha1"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"encoding/xml"
	"errors"
	"flag"
	"fmt"
	"hash/crc32"
	"hash/crc64"
	"io"
	"log"
	"net"
	"net/http"
	"net/url"
	"os"
	"runtime/debug"
	"sort"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

const pageSize = 1000
const controlPath = "/_sink"

type object struct {
	data     []byte
	etag     string
	modified time.Time
}

// store holds objects by "bucket/key" and unfinished multipart uploads by their id.
type store struct {
	mutex   sync.RWMutex
	objects map[string]object
	sorted  []string // nil: to be sorted anew
	uploads map[string]map[int][]byte
	counter atomic.Int64
}

type counters struct {
	bytesIn, bytesOut, connections atomic.Int64
	mutex                          sync.Mutex
	requests                       map[string]int64
}

var (
	objects = &store{objects: map[string]object{}, uploads: map[string]map[int][]byte{}}
	counted = &counters{requests: map[string]int64{}}
	latency time.Duration
)

// --- The link: bytes are counted, and held back where there is a limit --------------------------------

// bucket lets so many bytes a second through, for all connections together.
type bucket struct {
	mutex sync.Mutex
	rate  float64 // bytes a second; 0: no limit
	at    time.Time
}

const slack = 10 * time.Millisecond // what a late wake-up may make up for

func (b *bucket) wait(size int) {
	if b.rate == 0 || size <= 0 {
		return
	}
	b.mutex.Lock()
	if earliest := time.Now().Add(-slack); b.at.Before(earliest) {
		b.at = earliest
	}
	b.at = b.at.Add(time.Duration(float64(size) / b.rate * float64(time.Second)))
	pause := time.Until(b.at)
	b.mutex.Unlock()
	time.Sleep(pause)
}

var up, down bucket

const limitedPiece = 32 * 1024 // so that connections share a limited link evenly

type countedConn struct{ net.Conn }

func (c countedConn) Read(p []byte) (int, error) {
	if up.rate != 0 && len(p) > limitedPiece {
		p = p[:limitedPiece]
	}
	n, err := c.Conn.Read(p)
	counted.bytesIn.Add(int64(n))
	up.wait(n)
	return n, err
}

func (c countedConn) Write(p []byte) (int, error) {
	total := 0
	for first := true; first || len(p) > 0; first = false {
		piece := p
		if down.rate != 0 && len(piece) > limitedPiece {
			piece = piece[:limitedPiece]
		}
		down.wait(len(piece))
		n, err := c.Conn.Write(piece)
		counted.bytesOut.Add(int64(n))
		total += n
		if err != nil {
			return total, err
		}
		p = p[n:]
	}
	return total, nil
}

type countedListener struct{ net.Listener }

func (l countedListener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	counted.connections.Add(1)
	return countedConn{conn}, nil
}

// --- Bodies and their checksums ----------------------------------------------------------------------

var nvme = crc64.MakeTable(0x9a6c9329ac4bc9b5)
var castagnoli = crc32.MakeTable(crc32.Castagnoli)

var checksums = map[string]func([]byte) []byte{
	"x-amz-checksum-crc32":     func(b []byte) []byte { return binary.BigEndian.AppendUint32(nil, crc32.ChecksumIEEE(b)) },
	"x-amz-checksum-crc32c":    func(b []byte) []byte { return binary.BigEndian.AppendUint32(nil, crc32.Checksum(b, castagnoli)) },
	"x-amz-checksum-crc64nvme": func(b []byte) []byte { return binary.BigEndian.AppendUint64(nil, crc64.Checksum(b, nvme)) },
	"x-amz-checksum-sha1":      func(b []byte) []byte { sum := sha1.Sum(b); return sum[:] },
	"x-amz-checksum-sha256":    func(b []byte) []byte { sum := sha256.Sum256(b); return sum[:] },
	"content-md5":              func(b []byte) []byte { sum := md5.Sum(b); return sum[:] },
}

type failure struct {
	status        int
	code, message string
}

func (f failure) Error() string { return f.code + ": " + f.message }

// readBody returns the content of a request once every checksum that came with it is right.
func readBody(r *http.Request) ([]byte, error) {
	signed := r.Header.Get("x-amz-content-sha256")
	chunked := strings.HasPrefix(signed, "STREAMING-") || strings.Contains(r.Header.Get("Content-Encoding"), "aws-chunked")
	var data []byte
	var err error
	sent := map[string]string{}
	for name := range checksums {
		if value := r.Header.Get(name); value != "" {
			sent[name] = value
		}
	}
	switch {
	case chunked:
		data, err = readChunks(r, sent)
	case r.ContentLength >= 0:
		data = make([]byte, r.ContentLength)
		_, err = io.ReadFull(r.Body, data)
	default:
		data, err = io.ReadAll(r.Body)
	}
	if err != nil {
		return nil, failure{400, "IncompleteBody", err.Error()}
	}
	if digest, err := hex.DecodeString(signed); err == nil && len(digest) == sha256.Size {
		if sum := sha256.Sum256(data); !bytes.Equal(sum[:], digest) {
			return nil, failure{400, "XAmzContentSHA256Mismatch", "the content is not what was signed"}
		}
	}
	for name, value := range sent {
		if base64.StdEncoding.EncodeToString(checksums[name](data)) != value {
			return nil, failure{400, "BadDigest", name + " is not that of the content"}
		}
	}
	return data, nil
}

// readChunks undoes aws-chunked and adds the checksums of the trailer to those sent in headers.
func readChunks(r *http.Request, sent map[string]string) ([]byte, error) {
	size, _ := strconv.Atoi(r.Header.Get("x-amz-decoded-content-length"))
	data := make([]byte, 0, size)
	body := bufio.NewReaderSize(r.Body, 64*1024)
	for {
		line, err := body.ReadString('\n')
		if err != nil {
			return nil, err
		}
		text, _, _ := strings.Cut(strings.TrimSpace(line), ";")
		length, err := strconv.ParseInt(text, 16, 63)
		if err != nil {
			return nil, err
		}
		if length == 0 {
			break
		}
		start := len(data)
		data = append(data, make([]byte, length)...)
		if _, err := io.ReadFull(body, data[start:]); err != nil {
			return nil, err
		}
		if _, err := body.Discard(2); err != nil {
			return nil, err
		}
	}
	if len(data) != size {
		return nil, fmt.Errorf("%d bytes where %d were announced", len(data), size)
	}
	for {
		line, err := body.ReadString('\n')
		name, value, found := strings.Cut(strings.TrimSpace(line), ":")
		if _, known := checksums[strings.ToLower(name)]; found && known {
			sent[strings.ToLower(name)] = strings.TrimSpace(value)
		}
		if err != nil {
			return data, nil
		}
	}
}

// --- Objects -----------------------------------------------------------------------------------------

func (s *store) put(name string, data []byte, r *http.Request) (object, error) {
	made := object{data, fmt.Sprintf(`"%032x-1"`, s.counter.Add(1)), time.Now().UTC()}
	s.mutex.Lock()
	defer s.mutex.Unlock()
	before, exists := s.objects[name]
	if r.Header.Get("If-None-Match") == "*" && exists {
		return made, failure{412, "PreconditionFailed", "it exists"}
	}
	if wanted := r.Header.Get("If-Match"); wanted != "" && !exists {
		return made, failure{404, "NoSuchKey", name}
	} else if wanted != "" && strings.Trim(wanted, `"`) != strings.Trim(before.etag, `"`) {
		return made, failure{412, "PreconditionFailed", "it has changed"}
	}
	if !exists {
		s.sorted = nil
	}
	s.objects[name] = made
	return made, nil
}

func (s *store) get(name string) (object, bool) {
	s.mutex.RLock()
	defer s.mutex.RUnlock()
	found, ok := s.objects[name]
	return found, ok
}

func (s *store) remove(name string) {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	if _, exists := s.objects[name]; exists {
		delete(s.objects, name)
		s.sorted = nil
	}
}

func (s *store) names() []string {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	if s.sorted == nil {
		s.sorted = make([]string, 0, len(s.objects))
		for name := range s.objects {
			s.sorted = append(s.sorted, name)
		}
		sort.Strings(s.sorted)
	}
	return s.sorted
}

type content struct {
	Key, LastModified, ETag string
	Size                    int
	StorageClass            string
}

type listing struct {
	XMLName                                         xml.Name `xml:"ListBucketResult"`
	Name, Prefix, Delimiter                         string
	KeyCount, MaxKeys                               int
	IsTruncated                                     bool
	NextContinuationToken, NextMarker, EncodingType string `xml:",omitempty"`
	Contents                                        []content
	CommonPrefixes                                  []struct{ Prefix string }
}

func list(w http.ResponseWriter, bucket string, query url.Values) {
	prefix, delimiter := query.Get("prefix"), query.Get("delimiter")
	out := listing{Name: bucket, Prefix: prefix, Delimiter: delimiter, MaxKeys: pageSize, EncodingType: query.Get("encoding-type")}
	if most, err := strconv.Atoi(query.Get("max-keys")); err == nil && most < pageSize {
		out.MaxKeys = most
	}
	encode := func(key string) string {
		if out.EncodingType == "url" {
			return strings.ReplaceAll(url.QueryEscape(key), "%2F", "/")
		}
		return key
	}
	// The marker is that of the first version of the call, which rclone still uses.
	after := max(query.Get("start-after"), query.Get("continuation-token"), query.Get("marker"))
	names := objects.names()
	full := bucket + "/"
	start := sort.SearchStrings(names, full+max(prefix, after))
	last, group := "", ""
	for _, name := range names[start:] {
		if !strings.HasPrefix(name, full+prefix) {
			break
		}
		key := name[len(full):]
		if key <= after || (group != "" && strings.HasPrefix(key, group)) {
			continue
		}
		if delimiter != "" && after != "" && strings.HasSuffix(after, delimiter) && strings.HasPrefix(key, after) {
			continue
		}
		if out.KeyCount == out.MaxKeys {
			out.IsTruncated, out.NextContinuationToken, out.NextMarker = true, last, encode(last)
			break
		}
		out.KeyCount++
		if delimiter != "" {
			if at := strings.Index(key[len(prefix):], delimiter); at >= 0 {
				group = key[:len(prefix)+at+len(delimiter)]
				last = group
				out.CommonPrefixes = append(out.CommonPrefixes, struct{ Prefix string }{encode(group)})
				continue
			}
		}
		last = key
		if found, ok := objects.get(name); ok {
			modified := found.modified.Format("2006-01-02T15:04:05.000Z")
			out.Contents = append(out.Contents, content{encode(key), modified, found.etag, len(found.data), "STANDARD"})
		}
	}
	answer(w, out)
}

// --- Requests ----------------------------------------------------------------------------------------

func answer(w http.ResponseWriter, value any) {
	w.Header().Set("Content-Type", "application/xml")
	data, err := xml.Marshal(value)
	if err != nil {
		http.Error(w, err.Error(), 500)
		return
	}
	w.Write(data)
}

func refuse(w http.ResponseWriter, err error) {
	var known failure
	if !errors.As(err, &known) {
		known = failure{500, "InternalError", err.Error()}
	}
	w.Header().Set("Content-Type", "application/xml")
	w.WriteHeader(known.status)
	fmt.Fprintf(w, "<Error><Code>%s</Code><Message>%s</Message></Error>", known.code, known.message)
}

func serve(w http.ResponseWriter, r *http.Request) {
	if r.URL.Path == controlPath {
		control(w, r)
		return
	}
	bucket, key, _ := strings.Cut(strings.TrimPrefix(r.URL.Path, "/"), "/")
	query := r.URL.Query()
	if key == "" && r.Method == http.MethodGet && !query.Has("location") {
		counted.add("LIST")
	} else {
		counted.add(r.Method)
	}
	var err error
	if key == "" {
		err = serveBucket(w, r, bucket, query)
	} else {
		err = serveObject(w, r, bucket+"/"+key, query)
	}
	if err != nil {
		time.Sleep(latency)
		refuse(w, err)
	}
}

func (c *counters) add(kind string) {
	c.mutex.Lock()
	c.requests[kind]++
	c.mutex.Unlock()
}

func serveBucket(w http.ResponseWriter, r *http.Request, bucket string, query url.Values) error {
	body, err := readBody(r)
	if err != nil {
		return err
	}
	time.Sleep(latency)
	switch {
	case r.Method == http.MethodGet && query.Has("location"):
		w.Write([]byte("<LocationConstraint/>"))
	case r.Method == http.MethodGet:
		list(w, bucket, query)
	case r.Method == http.MethodPost && query.Has("delete"):
		return deleteMany(w, bucket, body)
	}
	return nil
}

func deleteMany(w http.ResponseWriter, bucket string, body []byte) error {
	var wanted struct{ Object []struct{ Key string } }
	if err := xml.Unmarshal(body, &wanted); err != nil {
		return failure{400, "MalformedXML", err.Error()}
	}
	for _, one := range wanted.Object {
		objects.remove(bucket + "/" + one.Key)
	}
	answer(w, struct {
		XMLName xml.Name `xml:"DeleteResult"`
		Deleted []struct{ Key string }
	}{Deleted: wanted.Object})
	return nil
}

func serveObject(w http.ResponseWriter, r *http.Request, name string, query url.Values) error {
	switch r.Method {
	case http.MethodGet, http.MethodHead:
		time.Sleep(latency)
		found, ok := objects.get(name)
		if !ok {
			return failure{404, "NoSuchKey", name}
		}
		w.Header().Set("ETag", found.etag)
		w.Header().Set("Content-Type", "application/octet-stream")
		http.ServeContent(w, r, "", found.modified, bytes.NewReader(found.data))
		return nil
	case http.MethodPut:
		data, err := readBody(r)
		if err != nil {
			return err
		}
		time.Sleep(latency)
		if id := query.Get("uploadId"); id != "" {
			return putPart(w, id, query.Get("partNumber"), data)
		}
		made, err := objects.put(name, data, r)
		w.Header().Set("ETag", made.etag)
		return err
	case http.MethodPost:
		body, err := readBody(r)
		if err != nil {
			return err
		}
		time.Sleep(latency)
		if query.Has("uploads") {
			return createUpload(w, name)
		}
		return completeUpload(w, r, name, query.Get("uploadId"), body)
	case http.MethodDelete:
		time.Sleep(latency)
		if id := query.Get("uploadId"); id != "" {
			objects.takeUpload(id)
		} else {
			objects.remove(name)
		}
		w.WriteHeader(http.StatusNoContent)
		return nil
	}
	return failure{405, "MethodNotAllowed", r.Method}
}

// --- Multipart ---------------------------------------------------------------------------------------

func createUpload(w http.ResponseWriter, name string) error {
	id := strconv.FormatInt(objects.counter.Add(1), 16)
	objects.mutex.Lock()
	objects.uploads[id] = map[int][]byte{}
	objects.mutex.Unlock()
	bucket, key, _ := strings.Cut(name, "/")
	answer(w, struct {
		XMLName               xml.Name `xml:"InitiateMultipartUploadResult"`
		Bucket, Key, UploadId string
	}{Bucket: bucket, Key: key, UploadId: id})
	return nil
}

func putPart(w http.ResponseWriter, id, number string, data []byte) error {
	at, err := strconv.Atoi(number)
	if err != nil {
		return failure{400, "InvalidArgument", "partNumber"}
	}
	objects.mutex.Lock()
	defer objects.mutex.Unlock()
	parts, exists := objects.uploads[id]
	if !exists {
		return failure{404, "NoSuchUpload", id}
	}
	parts[at] = data
	w.Header().Set("ETag", fmt.Sprintf(`"%032x-part"`, at))
	return nil
}

func (s *store) takeUpload(id string) (map[int][]byte, bool) {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	parts, exists := s.uploads[id]
	delete(s.uploads, id)
	return parts, exists
}

func completeUpload(w http.ResponseWriter, r *http.Request, name, id string, body []byte) error {
	var wanted struct{ Part []struct{ PartNumber int } }
	if err := xml.Unmarshal(body, &wanted); err != nil {
		return failure{400, "MalformedXML", err.Error()}
	}
	parts, exists := objects.takeUpload(id)
	if !exists {
		return failure{404, "NoSuchUpload", id}
	}
	var data []byte
	for _, part := range wanted.Part {
		piece, exists := parts[part.PartNumber]
		if !exists {
			return failure{400, "InvalidPart", strconv.Itoa(part.PartNumber)}
		}
		data = append(data, piece...)
		delete(parts, part.PartNumber)
	}
	made, err := objects.put(name, data, r)
	if err != nil {
		return err
	}
	bucket, key, _ := strings.Cut(name, "/")
	answer(w, struct {
		XMLName           xml.Name `xml:"CompleteMultipartUploadResult"`
		Bucket, Key, ETag string
	}{Bucket: bucket, Key: key, ETag: made.etag})
	return nil
}

// --- Control -----------------------------------------------------------------------------------------

func control(w http.ResponseWriter, r *http.Request) {
	if r.Method == http.MethodDelete {
		objects.mutex.Lock()
		objects.objects, objects.uploads, objects.sorted = map[string]object{}, map[string]map[int][]byte{}, nil
		objects.mutex.Unlock()
		debug.FreeOSMemory()
	}
	counted.mutex.Lock()
	defer counted.mutex.Unlock()
	var used syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &used); err != nil {
		http.Error(w, err.Error(), 500)
		return
	}
	total := int64(0)
	for _, count := range counted.requests {
		total += count
	}
	objects.mutex.RLock()
	held := len(objects.objects)
	objects.mutex.RUnlock()
	told := map[string]any{
		"requests": total, "by_kind": counted.requests, "connections": counted.connections.Load(), "objects": held,
		"bytes_in": counted.bytesIn.Load(), "bytes_out": counted.bytesOut.Load(),
		"cpu_seconds": float64(used.Utime.Nano()+used.Stime.Nano()) / 1e9,
	}
	if err := json.NewEncoder(w).Encode(told); err != nil {
		log.Print(err)
	}
	if r.Method == http.MethodPost || r.Method == http.MethodDelete {
		counted.requests = map[string]int64{}
		counted.bytesIn.Store(0)
		counted.bytesOut.Store(0)
		counted.connections.Store(0)
	}
}

func main() {
	port := flag.Int("port", 0, "port on the loopback address; 0: a free one")
	mbit := flag.Float64("mbit", 0, "Mbit/s that all connections share, each direction for itself; 0: no limit")
	pause := flag.Int("latency-ms", 0, "milliseconds before each answer")
	flag.Parse()
	up.rate, down.rate = *mbit*1e6/8, *mbit*1e6/8
	latency = time.Duration(*pause) * time.Millisecond
	listener, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", *port))
	if err != nil {
		log.Fatal(err)
	}
	fmt.Printf("http://%s\n", listener.Addr())
	os.Stdout.Sync()
	log.Fatal(http.Serve(countedListener{listener}, http.HandlerFunc(serve)))
}
