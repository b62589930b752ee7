package journal

import (
	"bytes"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"flag"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/cofferdb/coffer/kms"
)

var updateVectors = flag.Bool("update-vectors", false, "write the vectors anew; the format is published, so only for a new version")

const (
	vectorFile   = "../docs/format/vectors/record.json"
	vectorScript = "../docs/format/open_records.py"
)

type hexBytes []byte

func (h hexBytes) MarshalText() ([]byte, error) { return hex.AppendEncode(nil, h), nil }

func (h *hexBytes) UnmarshalText(b []byte) (err error) {
	*h, err = hex.AppendDecode(nil, b)
	return err
}

type vectors struct {
	Comment   string           `json:"comment"`
	Records   []recordVector   `json:"records"`
	Refused   []refusedVector  `json:"refused"`
	Subjects  []subjectVector  `json:"subjects"`
	Positions []positionVector `json:"positions"`
}

type recordVector struct {
	Name         string   `json:"name"`
	Region       string   `json:"region"`
	App          AppID    `json:"app"`
	LogID        hexBytes `json:"log_id"`
	TagKey       hexBytes `json:"tag_key"`
	Epoch        uint32   `json:"epoch"`
	EpochKey     hexBytes `json:"epoch_key"`
	SubjectKey   hexBytes `json:"subject_key"`
	ID           string   `json:"id"`
	Conversation string   `json:"conversation"`
	Sender       string   `json:"sender"`
	Recipient    string   `json:"recipient"`
	Target       string   `json:"target"`
	Header       hexBytes `json:"header"`
	AAD          hexBytes `json:"aad"`
	Plaintext    string   `json:"plaintext"`
	Record       hexBytes `json:"record"`
}

// refusedVector is a record that does not open: in the place of the record
// vector, or in another one.
type refusedVector struct {
	Name   string   `json:"name"`
	Vector int      `json:"vector"` // index of the record vector whose keys are used
	Region string   `json:"region"`
	App    AppID    `json:"app"`
	LogID  hexBytes `json:"log_id"`
	Record hexBytes `json:"record"`
	Error  string   `json:"error"` // "record", "envelope", "key mismatch" or "authentication"
}

type subjectVector struct {
	Plan         string  `json:"plan"`
	Shard        int     `json:"shard"`
	App          AppID   `json:"app"`
	Conversation kms.Tag `json:"conversation"`
	Subject      string  `json:"subject"`
	Stream       string  `json:"stream"` // in the region eu
}

type positionVector struct {
	Generation uint16   `json:"generation"`
	Sequence   uint64   `json:"sequence"`
	Position   Position `json:"position"`
}

func (v recordVector) dataKey(t *testing.T) *kms.DataKey {
	t.Helper()
	key, err := kms.DeriveDataKey(v.Region, v.App.String(), v.Epoch, v.tag(kms.KindSubject, v.Sender, true), v.EpochKey, v.SubjectKey)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// tag is written out here, so that the vectors do not rest on package kms.
func (v recordVector) tag(kind, id string, always bool) (tag kms.Tag) {
	if id == "" && !always {
		return tag
	}
	var msg []byte
	for _, part := range []string{"coffer/v1 tag", kind, id} {
		msg = binary.BigEndian.AppendUint32(msg, uint32(len(part)))
		msg = append(msg, part...)
	}
	mac := hmac.New(sha256.New, v.TagKey)
	mac.Write(msg)
	return kms.Tag(mac.Sum(nil)[:16])
}

func (v recordVector) header(e Event) Header {
	return Header{
		Type: e.Type, Millis: e.Time.UnixMilli(), Event: v.tag(kms.KindEvent, e.ID, false), Conversation: v.tag(kms.KindConversation, e.Conversation, false),
		Peer: v.tag(kms.KindSubject, e.Recipient, false), Target: v.tag(kms.KindEvent, e.Target, false),
	}
}

// operational are events that Coffer appends by itself.
func operational() []Event {
	at := time.Date(2026, 1, 2, 3, 4, 5, 678e6, time.UTC)
	return []Event{
		{
			ID: "coffer:endpoint-disabled:000102030405060708090a0b0c0d0e0f:1767323045678", Type: EndpointDisabled, Time: at,
			Data: jsontext.Value(`{"endpoint":"000102030405060708090a0b0c0d0e0f","reason":"gone"}`),
		},
		{
			ID: "coffer:account-expiring:acme:1767323045678", Type: AccountExpiring, Time: at,
			Data: jsontext.Value(`{"account":"acme","ends":"2026-07-01T03:04:05.678Z"}`),
		},
		{
			ID: "coffer:profile-expiring:101112131415161718191a1b1c1d1e1f:1767323045678", Type: ProfileExpiring, Time: at, Sender: "ann",
			Data: jsontext.Value(`{"ends":"2026-07-01T03:04:05.678Z"}`),
		},
	}
}

func makeVectors(t *testing.T) vectors {
	t.Helper()
	out := vectors{Comment: "Test vectors of docs/format/record.md and subjects.md. Binary values are in hex. Keys are for tests only."}
	fill := func(n int, from byte) []byte {
		b := make([]byte, n)
		for i := range b {
			b[i] = from + byte(i)
		}
		return b
	}
	var events []Event
	var names []string
	for _, tt := range accepted {
		e, err := ParseEvent([]byte(tt.in), testApp(), Limits{})
		if err != nil {
			t.Fatal(err)
		}
		events, names = append(events, e), append(names, tt.name)
	}
	for _, e := range operational() {
		events, names = append(events, e), append(names, e.Type.String())
	}
	for i, e := range events {
		if err := e.Normalize(testNow(), Limits{}); err != nil {
			t.Fatal(err)
		}
		v := recordVector{
			Name: names[i], Region: "eu", App: testApp(), LogID: fill(16, 0xa0), TagKey: fill(32, 0x80), Epoch: uint32(i), EpochKey: fill(32, byte(i)),
			SubjectKey: fill(32, 0x40), ID: e.ID, Conversation: e.Conversation, Sender: e.Sender, Recipient: e.Recipient, Target: e.Target,
		}
		v.Header = v.header(e).Append(nil)
		v.AAD = appendAAD(nil, v.Region, v.App, LogID(v.LogID), v.Header)
		v.Plaintext = string(e.AppendJSON(nil, testApp()))
		v.Record = v.dataKey(t).Seal(bytes.Clone(v.Header), v.AAD, []byte(v.Plaintext))
		out.Records = append(out.Records, v)
	}
	v := out.Records[0]
	add := func(name, want string, change func(*refusedVector)) {
		r := refusedVector{Name: name, Region: v.Region, App: v.App, LogID: bytes.Clone(v.LogID), Record: bytes.Clone(v.Record), Error: want}
		change(&r)
		out.Refused = append(out.Refused, r)
	}
	flip := func(at int) func(*refusedVector) { return func(r *refusedVector) { r.Record[at] ^= 1 } }
	add("empty", "record", func(r *refusedVector) { r.Record = hexBytes{} })
	add("cut in the header", "record", func(r *refusedVector) { r.Record = r.Record[:75] })
	add("magic", "record", flip(0))
	add("version", "record", flip(1))
	add("type not known", "record", func(r *refusedVector) { r.Record[2] = 0 })
	add("flags", "record", flip(3))
	add("another type", "authentication", func(r *refusedVector) { r.Record[2] = byte(MessageRecalled) })
	add("time", "authentication", flip(11))
	add("event tag", "authentication", flip(12))
	add("conversation tag", "authentication", flip(28))
	add("peer tag", "authentication", flip(44))
	add("target tag", "authentication", flip(75))
	add("no envelope", "envelope", func(r *refusedVector) { r.Record = r.Record[:76] })
	add("envelope magic", "envelope", flip(76))
	add("epoch", "key mismatch", flip(76+7))
	add("subject tag", "key mismatch", flip(76+8))
	add("key id", "key mismatch", flip(76+24))
	add("nonce", "authentication", flip(76+56))
	add("ciphertext", "authentication", flip(76+68))
	add("authentication tag", "authentication", func(r *refusedVector) { r.Record[len(r.Record)-1] ^= 1 })
	add("cut at the end", "authentication", func(r *refusedVector) { r.Record = r.Record[:len(r.Record)-1] })
	add("one byte more", "authentication", func(r *refusedVector) { r.Record = append(r.Record, 0) })
	add("of another app", "key mismatch", func(r *refusedVector) { r.App[15] ^= 1 })
	add("of another region", "key mismatch", func(r *refusedVector) { r.Region = "us" })
	add("of another log", "authentication", func(r *refusedVector) { r.LogID[0] ^= 1 })
	add("header of one event, envelope of another", "key mismatch", func(r *refusedVector) {
		r.Record = append(bytes.Clone(out.Records[0].Header), out.Records[1].Record[HeaderSize:]...)
	})

	for i, app := range []AppID{testApp(), {0: 1, 7: 0xff}} {
		for b := range byte(3) {
			s := subjectVector{Plan: DefaultPlans()[i].ID, Shard: 11 * i, App: app, Conversation: kms.Tag{0: 0xff, 15: 7 * b}}
			s.Subject = Subject{Plan: s.Plan, Shard: s.Shard, App: app, Bucket: BucketOf(s.Conversation)}.String()
			s.Stream = StreamName("eu", s.Plan, s.Shard)
			out.Subjects = append(out.Subjects, s)
		}
	}
	for _, p := range [][2]uint64{{0, 1}, {0, maxSequence}, {1, 1}, {4095, maxSequence}} {
		pos, err := NewPosition(uint16(p[0]), p[1])
		if err != nil {
			t.Fatal(err)
		}
		out.Positions = append(out.Positions, positionVector{uint16(p[0]), p[1], pos})
	}
	return out
}

func loadVectors(t testing.TB) vectors {
	t.Helper()
	b, err := os.ReadFile(vectorFile)
	if err != nil {
		t.Fatal(err)
	}
	var v vectors
	if err := json.Unmarshal(b, &v, json.RejectUnknownMembers(true)); err != nil {
		t.Fatal(err)
	}
	if len(v.Records) == 0 || len(v.Refused) == 0 || len(v.Subjects) == 0 || len(v.Positions) == 0 {
		t.Fatal("vectors are missing")
	}
	return v
}

func TestVectors(t *testing.T) {
	if *updateVectors {
		b, err := json.Marshal(makeVectors(t), jsontext.WithIndent(" "))
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(vectorFile, append(b, '\n'), 0o644); err != nil { //nolint:gosec // published
			t.Fatal(err)
		}
	}
	v := loadVectors(t)
	fresh := makeVectors(t)
	for i, r := range v.Records {
		t.Run(r.Name, func(t *testing.T) {
			e, err := ParseReplayed(SplicePosition(nil, []byte(r.Plaintext), 1))
			if err != nil || e.App != r.App {
				t.Fatalf("app %s, %v", e.App, err)
			}
			h := r.header(e.Event)
			if got := h.Append(nil); !bytes.Equal(got, r.Header) {
				t.Errorf("header\n got %x\nwant %x", got, r.Header)
			}
			parsed, envelope, err := ParseRecord(r.Record)
			if err != nil || parsed != h {
				t.Fatalf("the record's header is %+v, %v, want %+v", parsed, err, h)
			}
			if !parsed.Time().Equal(e.Time) {
				t.Errorf("time %v, want %v", parsed.Time(), e.Time)
			}
			if got := appendAAD(nil, r.Region, r.App, LogID(r.LogID), r.Header); !bytes.Equal(got, r.AAD) {
				t.Errorf("additional data\n got %x\nwant %x", got, r.AAD)
			}
			plain, err := r.dataKey(t).Open(nil, r.AAD, envelope)
			if err != nil || string(plain) != r.Plaintext {
				t.Errorf("opens to %q, %v", plain, err)
			}
			// What is published is what is made now: all but the nonce.
			if f := fresh.Records[i]; !bytes.Equal(f.Header, r.Header) || !bytes.Equal(f.AAD, r.AAD) || f.Plaintext != r.Plaintext || len(f.Record) != len(r.Record) {
				t.Error("this version makes another record")
			}
		})
	}
	for _, r := range v.Refused {
		t.Run("refused/"+r.Name, func(t *testing.T) {
			if got := openVector(t, v.Records[r.Vector], r); got != r.Error {
				t.Errorf("got %q, want %q", got, r.Error)
			}
		})
	}
	for _, s := range v.Subjects {
		want := Subject{Plan: s.Plan, Shard: s.Shard, App: s.App, Bucket: BucketOf(s.Conversation)}
		if got, err := ParseSubject(s.Subject); err != nil || got != want || want.String() != s.Subject || StreamName("eu", s.Plan, s.Shard) != s.Stream {
			t.Errorf("%s: %+v, %v", s.Subject, got, err)
		}
	}
	for _, p := range v.Positions {
		if got, err := NewPosition(p.Generation, p.Sequence); err != nil || got != p.Position {
			t.Errorf("%d/%d: %v, %v", p.Generation, p.Sequence, got, err)
		}
	}
}

// openVector opens a record as the vector of the place where it was found, and
// returns the class of the error.
func openVector(t *testing.T, place recordVector, r refusedVector) string {
	t.Helper()
	place.Region, place.App, place.LogID = r.Region, r.App, r.LogID
	_, envelope, err := ParseRecord(r.Record)
	if err != nil {
		if !errors.Is(err, ErrCorrupt) {
			t.Errorf("class of %v", err)
		}
		return "record"
	}
	aad := appendAAD(nil, place.Region, place.App, LogID(place.LogID), r.Record[:HeaderSize])
	_, err = place.dataKey(t).Open(nil, aad, envelope)
	switch {
	case err == nil:
		return "opened"
	case errors.Is(err, kms.ErrEnvelope):
		return "envelope"
	case errors.Is(err, kms.ErrKeyMismatch):
		return "key mismatch"
	case errors.Is(err, kms.ErrAuthentication):
		return "authentication"
	}
	return err.Error()
}

func TestVectorsOpenElsewhere(t *testing.T) {
	python, err := exec.LookPath("python3")
	if err == nil {
		err = exec.CommandContext(t.Context(), python, "-c", "import cryptography").Run()
	}
	if err != nil {
		const reason = "skipped: needs python3 with the package cryptography; install it with pip install cryptography"
		if os.Getenv("COFFER_TEST_REQUIRE") == "all" {
			t.Fatal(reason)
		}
		t.Skip(reason)
	}
	out, err := exec.CommandContext(t.Context(), python, vectorScript).CombinedOutput()
	if err != nil || !strings.HasPrefix(string(out), "opened") {
		t.Fatalf("%v\n%s", err, out)
	}
	t.Logf("%s", out)

	// A script that accepts anything would prove nothing.
	v := loadVectors(t)
	v.Records[0].Record[HeaderSize-1] ^= 1
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	damaged := filepath.Join(t.TempDir(), "record.json")
	if err := os.WriteFile(damaged, b, 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.CommandContext(t.Context(), python, vectorScript, damaged).CombinedOutput(); err == nil {
		t.Fatalf("the script accepts a damaged record: %s", out)
	}
}

func TestRecordDoesNotAllocate(t *testing.T) {
	h := Header{Type: MessageSent, Millis: testNow().UnixMilli(), Event: kms.Tag{1}}
	record := make([]byte, 0, 512)
	aad := make([]byte, 0, 512)
	if n := testing.AllocsPerRun(100, func() {
		record = h.Append(record[:0])
		aad = appendAAD(aad[:0], "eu", testApp(), LogID{}, record)
		if _, _, err := ParseRecord(record); err != nil {
			t.Error(err)
		}
	}); n > 0 {
		t.Errorf("%v allocations", n)
	}
}
