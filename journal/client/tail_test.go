package client

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sync/errgroup"
)

// eventStreamFrom is a stream as the server sends it, after the place given: n
// events, one place that nothing was selected up to, a comment, the trailer.
func eventStreamFrom(after, n int) []byte {
	var b bytes.Buffer
	b.WriteString("retry: 0\n\n")
	for i := after + 1; i <= n; i++ {
		fmt.Fprintf(&b, "id: c1_%d\ndata: %s\n:\n\n", i, eventLine(i)[:len(eventLine(i))-1])
	}
	fmt.Fprintf(&b, ":\n\nid: c1_%d\n\n", n)
	fmt.Fprintf(&b, "event: end\nid: c1_%d\ndata: {\"end\":{\"count\":%d,\"omitted\":0,\"next\":\"c1_%d\",\"checkpoint\":null}}\n\n", n, n-after, n)
	return b.Bytes()
}

// TestTailIsCutAtEveryByte: whatever the byte at which the first answer ends, the
// caller gets each event once and in order.
func TestTailIsCutAtEveryByte(t *testing.T) {
	const events = 6
	whole := eventStreamFrom(0, events)
	var served sync.Map // the cuts, by the name of the conversation
	c := start(t, func(w http.ResponseWriter, r *http.Request) {
		after, _ := strconv.Atoi(strings.TrimPrefix(r.Header.Get("Last-Event-ID"), "c1_")) // 0 without
		body := eventStreamFrom(after, events)
		w.Header().Set("Content-Type", "text/event-stream")
		w.Header().Set("Content-Length", strconv.Itoa(len(body)))
		name := r.URL.Query().Get("conversation")
		if _, again := served.LoadOrStore(name, true); !again {
			cut, _ := strconv.Atoi(name)
			body = body[:cut]
		}
		_, _ = w.Write(body)
	})
	var readers errgroup.Group
	readers.SetLimit(32)
	for cut := range len(whole) {
		readers.Go(func() error {
			var got []int
			tail := c.Tail(t.Context(), Query{Limit: events, Conversation: strconv.Itoa(cut)})
			for e, err := range tail.Events() {
				if err != nil {
					return fmt.Errorf("cut at %d: after %v: %w", cut, got, err)
				}
				got = append(got, int(e.Position))
				if want := strings.TrimSuffix(eventLine(int(e.Position)), "\n"); string(e.JSON) != want {
					return fmt.Errorf("cut at %d: %s, want %s", cut, e.JSON, want)
				}
			}
			if fmt.Sprint(got) != "[1 2 3 4 5 6]" || tail.Next() != "c1_6" {
				return fmt.Errorf("cut at %d: %v, next %s", cut, got, tail.Next())
			}
			return nil
		})
	}
	if err := readers.Wait(); err != nil {
		t.Fatal(err)
	}
}

func TestTailEnds(t *testing.T) {
	for name, c := range map[string]struct {
		answer string
		media  string
		want   error
	}{
		"a refusal":   {"", "", ErrForbidden},
		"a problem":   {"event: end\nid: c1_4\ndata: {\"end\":{\"count\":0,\"next\":\"c1_4\",\"problem\":{\"type\":\"urn:coffer:problem:token-expired\",\"status\":401}}}\n\n", "text/event-stream", ErrUnauthorized},
		"not events":  {"<html>", "text/html", ErrProtocol},
		"no position": {"data: {}\n\n", "text/event-stream", ErrProtocol},
		"too long":    {"data: " + strings.Repeat("x", maxReplayLine+1) + "\n\n", "text/event-stream", ErrProtocol},
		"long lines":  {strings.Repeat("data: "+strings.Repeat("x", maxReplayLine/2)+"\n", 3) + "\n", "text/event-stream", ErrProtocol},
	} {
		t.Run(name, func(t *testing.T) {
			client := start(t, func(w http.ResponseWriter, r *http.Request) {
				if c.media == "" {
					problemJSON(w, 403, "privilege-missing", "no", false)
					return
				}
				w.Header().Set("Content-Type", c.media)
				_, _ = io.WriteString(w, c.answer)
			})
			var err error
			for _, err = range client.Tail(t.Context(), Query{}).Events() { //nolint:revive // the last error counts
			}
			if !errors.Is(err, c.want) {
				t.Errorf("ended with %v, want %v", err, c.want)
			}
		})
	}
}
