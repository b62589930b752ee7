package importer

import (
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-json-experiment/json"

	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/journal/client"
)

// store is a model of the server: it keeps events by id and in order, and hides
// and refuses what is older than its retention.
type store struct {
	retention time.Duration
	before    func(n int, e []journal.Event) error // called with the number of the request

	mu       sync.Mutex // guards what follows
	events   map[string]journal.Event
	order    []journal.Event
	requests int
	appended int // requests, not counting those that failed
	underway map[string]bool
}

func newStore() *store {
	return &store{retention: 180 * 24 * time.Hour, events: map[string]journal.Event{}, underway: map[string]bool{}}
}

func refusal(status int, code string) *client.Problem {
	return &client.Problem{Type: "urn:coffer:problem:" + code, Status: status}
}

func (s *store) Append(ctx context.Context, events ...journal.Event) ([]journal.Result, error) {
	s.mu.Lock()
	n := s.requests
	s.requests++
	for _, e := range events {
		if s.underway[e.Conversation] {
			s.mu.Unlock()
			return nil, fmt.Errorf("two requests under way for conversation %s", e.Conversation)
		}
	}
	for _, e := range events {
		s.underway[e.Conversation] = true
	}
	s.mu.Unlock()
	time.Sleep(time.Millisecond) // let other lanes come
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, e := range events {
		delete(s.underway, e.Conversation)
	}
	if s.before != nil {
		if err := s.before(n, events); err != nil {
			return nil, err
		}
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	s.appended++
	results := make([]journal.Result, len(events))
	for i, e := range events {
		results[i].ID, results[i].Time = e.ID, e.Time
		results[i].Duplicate, results[i].Err = s.put(e)
	}
	return results, nil
}

func (s *store) put(e journal.Event) (duplicate bool, err error) {
	oldest := time.Now().Add(-s.retention)
	if e.Time.Before(oldest) {
		p := refusal(422, "retention-expired")
		p.OldestAvailable = oldest.Truncate(time.Second)
		return false, p
	}
	if strings.Contains(string(e.Data), "the server refuses this") {
		return false, refusal(400, "invalid-request")
	}
	if old, ok := s.events[e.ID]; ok {
		if !old.Time.Equal(e.Time) || !bytes.Equal(old.Data, e.Data) {
			return false, refusal(409, "idempotency-conflict")
		}
		return true, nil
	}
	s.events[e.ID] = e
	s.order = append(s.order, e)
	return false, nil
}

func (s *store) Event(_ context.Context, id string) (journal.Replayed, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	e, ok := s.events[id]
	switch {
	case !ok:
		return journal.Replayed{}, refusal(404, "not-found")
	case e.Time.Before(time.Now().Add(-s.retention)):
		return journal.Replayed{}, refusal(410, "retention-expired")
	}
	return journal.Replayed{Event: e}, nil
}

// start of the messages, long before the bubble's clock (2000-01-01) would do:
// messages of 2000 are accepted from then on.
const startMillis = 946684800000

// messages writes n messages, one every gap, over a few conversations.
func messages(n int, gap time.Duration) string {
	var b strings.Builder
	for i := range n {
		fmt.Fprintf(&b, `{"msg_id":"m%d","timestamp":%d,"from":"u%d","to":"g%d","chat_type":"groupchat","payload":{"bodies":[{"type":"txt","msg":"text %d"}]}}`+"\n",
			i, startMillis+int64(i)*gap.Milliseconds(), i%7, i%5, i)
	}
	return b.String()
}

func write(t *testing.T, name, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func options(t *testing.T, files ...string) Options {
	return Options{Files: files, Rejects: filepath.Join(t.TempDir(), "rejects.ndjson"), Talk: io.Discard, Batch: 10, Lanes: 3}
}

// ordered checks that every conversation has its messages in the file's order.
func (s *store) ordered(t *testing.T, want int) {
	t.Helper()
	last := map[string]int{}
	for _, e := range s.order {
		var n int
		if _, err := fmt.Sscanf(e.ID, "m%d", &n); err != nil {
			t.Fatal(err)
		}
		if before, ok := last[e.Conversation]; ok && n <= before {
			t.Fatalf("conversation %s has m%d after m%d", e.Conversation, n, before)
		}
		last[e.Conversation] = n
	}
	if len(s.order) != want {
		t.Errorf("%d events stored, want %d", len(s.order), want)
	}
}

// bubble runs f where time is simulated and begins ten days after the messages.
func bubble(t *testing.T, f func(t *testing.T)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		time.Sleep(10 * 24 * time.Hour)
		f(t)
	})
}

func TestOrderAndAgain(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s := newStore()
		o := options(t, write(t, "a.jsonl", messages(500, time.Second)))
		res, err := Run(t.Context(), s, o)
		if err != nil {
			t.Fatal(err)
		}
		if want := (Summary{Read: 500, Imported: 500}); res.Summary != want {
			t.Errorf("summary %+v, want %+v", res.Summary, want)
		}
		s.ordered(t, 500)
		if _, err := os.Stat(o.Rejects); !errors.Is(err, os.ErrNotExist) {
			t.Error("an empty rejects file was left")
		}
		if res, err = Run(t.Context(), s, o); err != nil || res.Summary != (Summary{Read: 500, Duplicates: 500}) {
			t.Errorf("again: %+v, %v", res.Summary, err)
		}
		s.ordered(t, 500)
	})
}

func TestBadLinesDoNotStopTheRest(t *testing.T) {
	bubble(t, func(t *testing.T) {
		good := strings.SplitAfter(messages(6, time.Second), "\n")
		long := `{"msg_id":"` + strings.Repeat("é", 1<<20) + `"}` + "\n"
		text := good[0] + "not json\n" + good[1] + "\n" + long + strings.Replace(good[2], "m2", "with.dot", 1) + good[3] +
			strings.Replace(good[2], `"m2"`, `"coffer:account-expiring:x:1"`, 1) + "\xff\xfe\n" + strings.Replace(good[4], "text 4", "the server refuses this", 1) + strings.Replace(good[1], "text 1", "another", 1) + good[5]
		file := write(t, "a.jsonl", text)
		var talk bytes.Buffer
		o := options(t, file)
		o.Talk = &talk
		s := newStore()
		res, err := Run(t.Context(), s, o)
		if err != nil {
			t.Fatal(err)
		}
		if want := (Summary{Read: 11, Imported: 4, Rejected: 7}); res.Summary != want {
			t.Errorf("summary %+v, want %+v", res.Summary, want)
		}
		info, err := os.Stat(res.RejectsFile)
		if err != nil || info.Mode().Perm() != 0o600 {
			t.Fatalf("the rejects file: %v, %v", info, err)
		}
		b, err := os.ReadFile(res.RejectsFile)
		if err != nil {
			t.Fatal(err)
		}
		got := map[int]reject{}
		for line := range strings.Lines(string(b)) {
			var r reject
			if err := json.Unmarshal([]byte(line), &r); err != nil {
				t.Fatalf("%.100s: %v", line, err)
			}
			if r.File != file {
				t.Errorf("file %s", r.File)
			}
			got[r.Line] = r
			if len(r.Reason) > 0 && !strings.Contains(talk.String(), fmt.Sprintf("%s:%d: %s\n", file, r.Line, r.Reason)) {
				t.Errorf("line %d was not told", r.Line)
			}
		}
		for line, want := range map[int]string{
			2: "not JSON", 5: "longer than 1 MiB", 6: "/id: an event's id must not contain a full stop", 8: "/id: ids that begin with coffer:", 9: "not JSON: invalid", 10: "invalid-request",
			11: "idempotency-conflict",
		} {
			if !strings.Contains(got[line].Reason, want) {
				t.Errorf("line %d: reason %q, want %q", line, got[line].Reason, want)
			}
		}
		if got[2].Raw != "not json" || got[9].RawBase64 != "//4=" || !got[5].Truncated || len(got[5].Raw) > maxRaw {
			t.Errorf("raw lines: %.40q %q %v %d", got[2].Raw, got[9].RawBase64, got[5].Truncated, len(got[5].Raw))
		}
		if !strings.HasPrefix(good[1], got[2].Raw) && got[11].Raw == "" {
			t.Error("the refused line's raw text is missing")
		}
	})
}

// TestRebaseFindsItsShift: a second run, days later and with another newest
// message, must take the times of the first.
func TestRebaseFindsItsShift(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s := newStore()
		o := options(t, write(t, "a.jsonl", messages(200, time.Hour)))
		o.Rebase = true
		began := time.Now()
		res, err := Run(t.Context(), s, o)
		if err != nil || res.Imported != 200 || res.ShiftFound {
			t.Fatalf("%+v, %v", res, err)
		}
		if newest := s.events["m199"].Time; newest.Before(began) || newest.After(time.Now()) {
			t.Errorf("the newest message is of %s, not of now", newest)
		}
		if gap := s.events["m199"].Time.Sub(s.events["m0"].Time); gap != 199*time.Hour {
			t.Errorf("the messages are %s apart, want 199h", gap)
		}
		s.ordered(t, 200)
		time.Sleep(90 * 24 * time.Hour)
		o.Files = append(o.Files, write(t, "b.jsonl", `{"msg_id":"m200","timestamp":946684800001,"from":"a","to":"b","chat_type":"chat","payload":{"bodies":[{"type":"txt","msg":"m"}]}}`))
		if res, err = Run(t.Context(), s, o); err != nil || res.Duplicates != 200 || res.Imported != 1 || !res.ShiftFound {
			t.Errorf("again: %+v, %v", res, err)
		}
	})
}

// TestKilledAnywhere ends the first run at every request, with what was under way
// lost or stored, and lets a second run, an hour later, finish the work.
func TestKilledAnywhere(t *testing.T) {
	killed := errors.New("killed")
	for _, rebase := range []bool{false, true} {
		for at := 0; ; at++ {
			done := false
			bubble(t, func(t *testing.T) {
				s := newStore()
				o := options(t, write(t, "a.jsonl", messages(120, time.Minute)))
				o.Rebase = rebase
				s.before = func(n int, _ []journal.Event) error {
					if n >= at {
						return killed
					}
					return nil
				}
				if _, err := Run(t.Context(), s, o); err == nil {
					done = true
				} else if !errors.Is(err, killed) {
					t.Fatal(err)
				}
				stored := len(s.order)
				s.before = nil
				time.Sleep(time.Hour)
				res, err := Run(t.Context(), s, o)
				if err != nil || res.Rejected != 0 || res.Imported+res.Duplicates != 120 || res.Duplicates != stored {
					t.Fatalf("rebase %v, killed at request %d with %d stored: %+v, %v", rebase, at, stored, res, err)
				}
				s.ordered(t, 120)
			})
			if done {
				if at < 12 {
					t.Errorf("only %d requests", at)
				}
				break
			}
		}
	}
}

// TestKilledBeforeTheFirst: the request with the first messages hangs and is
// lost, while later ones of other conversations are stored.
func TestKilledBeforeTheFirst(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s := newStore()
		lines := strings.SplitAfter(messages(5000, time.Second), "\n")
		for i := range 40 {
			lines[i] = strings.Replace(lines[i], fmt.Sprintf(`"to":"g%d"`, i%5), `"to":"first"`, 1)
		}
		for i := range 5 {
			if laneOf("first", 16) == laneOf(fmt.Sprintf("g%d", i), 16) {
				t.Fatal("another conversation waits behind the first: give it another name")
			}
		}
		o := options(t, write(t, "a.jsonl", strings.Join(lines, "")))
		o.Rebase, o.Lanes, o.Batch = true, 16, 20 // the two batches of "first" do not hold up the reader
		killed := errors.New("killed")
		s.before = func(_ int, events []journal.Event) error {
			if len(events) > 1 && events[0].Conversation == "first" || s.appended >= 4 {
				s.mu.Unlock()
				time.Sleep(time.Second)
				s.mu.Lock()
				return killed
			}
			return nil
		}
		if _, err := Run(t.Context(), s, o); !errors.Is(err, killed) {
			t.Fatal(err)
		}
		if len(s.order) < 2 {
			t.Fatalf("only %d events stored", len(s.order))
		}
		s.before = nil
		time.Sleep(time.Hour)
		if res, err := Run(t.Context(), s, o); err != nil || !res.ShiftFound || res.Rejected != 0 || res.Imported+res.Duplicates != 5000 {
			t.Errorf("%+v, %v", res, err)
		}
	})
}

// TestRebaseWhenTheFirstAreTooOld: the beginning of a long history is older than
// the plan keeps even after the shift.
func TestRebaseWhenTheFirstAreTooOld(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s := newStore()
		s.retention = 3 * 24 * time.Hour
		o := options(t, write(t, "a.jsonl", messages(5000, 144*time.Second))) // 8.3 days
		o.Rebase = true
		killed := errors.New("killed")
		s.before = func(int, []journal.Event) error {
			if len(s.order) > 0 {
				return killed // as soon as anything is stored
			}
			return nil
		}
		if _, err := Run(t.Context(), s, o); !errors.Is(err, killed) {
			t.Fatal(err)
		}
		s.before = nil
		time.Sleep(time.Minute)
		res, err := Run(t.Context(), s, o)
		if err != nil || !res.ShiftFound || res.Rejected != 0 || res.Imported+res.Duplicates+res.SkippedExpired != 5000 ||
			res.SkippedExpired < 3000 || res.SkippedExpired > 3300 {
			t.Errorf("%+v, %v", res, err)
		}
	})
}

func TestExpiredIsCounted(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s := newStore()
		s.retention = 9 * 24 * time.Hour
		o := options(t, write(t, "a.jsonl", messages(48, time.Hour)))
		res, err := Run(t.Context(), s, o)
		if err != nil || res.SkippedExpired < 23 || res.SkippedExpired+res.Imported != 48 || res.Rejected != 0 {
			t.Errorf("%+v, %v", res, err)
		}
	})
}

func TestStopFinishesWhatIsUnderWay(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s := newStore()
		stop := make(chan struct{})
		o := options(t, write(t, "a.jsonl", messages(1000, time.Second)))
		o.Stop = stop
		s.before = func(n int, _ []journal.Event) error {
			if n == 5 {
				close(stop)
			}
			return nil
		}
		res, err := Run(t.Context(), s, o)
		if !errors.Is(err, ErrInterrupted) {
			t.Fatal(err)
		}
		if s.requests != s.appended {
			t.Errorf("%d requests were begun and %d finished", s.requests, s.appended)
		}
		if res.Imported != len(s.order) || res.Imported == 0 || res.Imported == 1000 {
			t.Errorf("imported %d, stored %d", res.Imported, len(s.order))
		}
		o.Stop = nil
		if res, err = Run(t.Context(), s, o); err != nil || res.Imported+res.Duplicates != 1000 {
			t.Errorf("%+v, %v", res, err)
		}
		s.ordered(t, 1000)
	})
}

// TestRefusedRequestIsDivided: one event makes the server refuse the request.
func TestRefusedRequestIsDivided(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s := newStore()
		s.before = func(_ int, events []journal.Event) error {
			for _, e := range events {
				if e.ID == "m17" {
					return refusal(413, "payload-too-large")
				}
			}
			return nil
		}
		res, err := Run(t.Context(), s, options(t, write(t, "a.jsonl", messages(40, time.Second))))
		if err != nil || res.Summary != (Summary{Read: 40, Imported: 39, Rejected: 1}) {
			t.Errorf("%+v, %v", res, err)
		}
	})
}

func TestFailureEndsTheRun(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s := newStore()
		s.before = func(int, []journal.Event) error { return refusal(401, "token-expired") }
		res, err := Run(t.Context(), s, options(t, write(t, "a.jsonl", messages(400, time.Second))))
		if !errors.Is(err, client.ErrUnauthorized) || res.Imported+res.Rejected != 0 {
			t.Errorf("%+v, %v", res, err)
		}
	})
}

func TestUnreadableFiles(t *testing.T) {
	bubble(t, func(t *testing.T) {
		var packed bytes.Buffer
		z := gzip.NewWriter(&packed)
		_, _ = io.WriteString(z, messages(100, time.Second))
		_ = z.Close()
		half := write(t, "half.gz", packed.String()[:packed.Len()-9])
		rest := write(t, "rest.jsonl", strings.ReplaceAll(messages(20, time.Second), `:"m`, `:"m10`))
		s := newStore()
		res, err := Run(t.Context(), s, options(t, filepath.Join(t.TempDir(), "missing"), half, t.TempDir(), rest))
		if !errors.Is(err, ErrUnreadable) || !errors.Is(err, io.ErrUnexpectedEOF) || !errors.Is(err, os.ErrNotExist) {
			t.Errorf("error %v", err)
		}
		if res.Imported < 20 || s.events["m1019"].ID == "" {
			t.Errorf("the readable file was not imported: %+v", res)
		}
	})
}

func TestStandardInput(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s := newStore()
		o := options(t, "-")
		o.Stdin = strings.NewReader(messages(30, time.Second))
		if res, err := Run(t.Context(), s, o); err != nil || res.Imported != 30 {
			t.Errorf("%+v, %v", res, err)
		}
		o.Rebase = true
		if _, err := Run(t.Context(), s, o); err == nil || !strings.Contains(err.Error(), "save it to a file first") {
			t.Errorf("error %v", err)
		}
	})
}

func TestRejectsFileIsNoInput(t *testing.T) {
	file := write(t, "a.jsonl", messages(3, time.Second))
	o := options(t, file)
	o.Rejects = file
	if _, err := Run(t.Context(), newStore(), o); err == nil || !strings.Contains(err.Error(), "is one of the files to import") {
		t.Errorf("error %v", err)
	}
	if b, err := os.ReadFile(file); err != nil || len(b) == 0 {
		t.Error("the input was overwritten")
	}
	o.Files, o.Rejects = []string{file}, filepath.Join(t.TempDir(), "no", "such", "folder")
	if _, err := Run(t.Context(), newStore(), o); err == nil {
		t.Error("a run that cannot keep its rejects began")
	}
}

func TestNothingToRebase(t *testing.T) {
	bubble(t, func(t *testing.T) {
		o := options(t, write(t, "a.jsonl", "x\n"))
		o.Rebase = true
		if _, err := Run(t.Context(), newStore(), o); !errors.Is(err, ErrNothing) {
			t.Errorf("error %v", err)
		}
	})
}

func TestProgressMovesOn(t *testing.T) {
	bubble(t, func(t *testing.T) {
		var last Progress
		scanned := false
		o := options(t, write(t, "a.jsonl", messages(11000, time.Second)))
		o.Batch, o.Rebase = 500, true
		o.Progress = func(p Progress) {
			if p.Scanning {
				scanned = true
				return
			}
			if p.Bytes < last.Bytes || p.Read < last.Read || p.Total == 0 {
				t.Errorf("from %+v to %+v", last, p)
			}
			last = p
		}
		if _, err := Run(t.Context(), newStore(), o); err != nil {
			t.Fatal(err)
		}
		if last.Read != 11000 || last.Bytes != last.Total || !scanned {
			t.Errorf("at the end %+v, scanned %v", last, scanned)
		}
	})
}
