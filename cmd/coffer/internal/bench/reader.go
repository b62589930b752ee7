package bench

import (
	"bufio"
	"bytes"
	"context"
	"crypto/fips140"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/coder/websocket"
	"github.com/go-json-experiment/json"
	"golang.org/x/sync/errgroup"
)

// readerSpec is the first line that the readers' process gets.
type readerSpec struct {
	caller

	Form  string `json:"form"`
	Tails int    `json:"tails"`
	First int    `json:"first"` // number of the first event
}

// readerOrder asks for so many events, of which all tails then wait for.
type readerOrder struct {
	Events int `json:"events"`
	Rate   int `json:"rate"` // a second
}

// readerAnswer answers the spec when all tails are open, and each order when all
// tails have all events.
type readerAnswer struct {
	Problem  string  `json:"problem,omitempty"`
	Appends  []int64 `json:"appends,omitzero"` // nanoseconds
	Arrivals []int64 `json:"arrivals,omitzero"`
}

// audience is the tails and the writer.
type audience struct {
	spec   readerSpec
	tls    *tls.Config
	client *http.Client // the writer's
	next   int          // number of the next event

	arrived chan arrival
	failed  chan error
	ended   context.Context //nolint:containedctx // ends with the process's work
}

// arrival is an event at a tail.
type arrival struct {
	event int
	at    time.Time
}

// ReadTails has the tails and the writer of [Tail]. It follows the orders of in
// until that ends, and answers on out.
func ReadTails(ctx context.Context, in io.Reader, out io.Writer) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	lines := bufio.NewReader(in)
	r := &audience{arrived: make(chan arrival, 1<<14), failed: make(chan error, 1), ended: ctx}
	var tails sync.WaitGroup
	defer tails.Wait()
	defer cancel()
	first := true
	for {
		line, err := lines.ReadBytes('\n')
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		var a readerAnswer
		if first {
			err = r.open(ctx, line, &tails)
		} else {
			a, err = r.run(ctx, line)
		}
		first = false
		if err != nil {
			a.Problem = err.Error()
		}
		text, err := json.Marshal(a)
		if err != nil {
			return err
		}
		if _, err := out.Write(append(text, '\n')); err != nil {
			return err
		}
	}
}

func (r *audience) open(ctx context.Context, line []byte, tails *sync.WaitGroup) error {
	if err := json.Unmarshal(line, &r.spec); err != nil {
		return err
	}
	var err error
	if r.tls, err = r.spec.caller.tls(); err != nil {
		return err
	}
	r.next = r.spec.First
	r.client = &http.Client{Transport: &http.Transport{TLSClientConfig: r.tls}}
	open := r.eventStream
	if r.spec.Form == formSocket {
		open = r.socket
	}
	group, groupCtx := errgroup.WithContext(ctx)
	group.SetLimit(32)
	for range r.spec.Tails {
		group.Go(func() error {
			read, err := open(groupCtx, ctx)
			if err != nil {
				return err
			}
			tails.Go(func() {
				if err := read(); err != nil && ctx.Err() == nil {
					select {
					case r.failed <- err:
					default:
					}
				}
			})
			return nil
		})
	}
	return group.Wait()
}

// run appends events and waits until each tail has each of them.
func (r *audience) run(ctx context.Context, line []byte) (a readerAnswer, err error) {
	var o readerOrder
	if err := json.Unmarshal(line, &o); err != nil {
		return a, err
	}
	first := r.next
	begun := make([]time.Time, o.Events)
	written := make(chan error, 1)
	go func() {
		tick := time.NewTicker(time.Second / time.Duration(o.Rate))
		defer tick.Stop()
		for i := range begun {
			begun[i] = time.Now()
			if err := r.append(ctx, first+i); err != nil {
				written <- err
				return
			}
			a.Appends = append(a.Appends, time.Since(begun[i]).Nanoseconds())
			select {
			case <-tick.C:
			case <-ctx.Done():
			}
		}
		written <- nil
	}()
	r.next += o.Events
	arrivals := make([]arrival, 0, o.Events*r.spec.Tails)
	writing := true
	for writing || len(arrivals) < cap(arrivals) {
		select {
		case got := <-r.arrived:
			arrivals = append(arrivals, got)
		case err := <-written:
			if writing = false; err != nil {
				return a, err
			}
		case err := <-r.failed:
			return a, err
		case <-ctx.Done():
			return a, ctx.Err()
		}
	}
	for _, got := range arrivals {
		a.Arrivals = append(a.Arrivals, got.at.Sub(begun[got.event-first]).Nanoseconds())
	}
	return a, nil
}

const tailEvent = "tail-"

func (r *audience) append(ctx context.Context, n int) error {
	body := fmt.Sprintf(`{"id":"%s%09d","type":"message.sent","sender":"ann","recipient":"ben","data":{"bodies":[{"type":"txt","msg":%q}]}}`,
		tailEvent, n, strings.Repeat("m", 500))
	req, err := r.request(ctx, http.MethodPost, "", strings.NewReader(body))
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/json")
	resp, err := r.client.Do(req)
	if err != nil {
		return err
	}
	defer func() { _ = resp.Body.Close() }()
	if _, err := io.Copy(io.Discard, resp.Body); err != nil {
		return err
	}
	if resp.StatusCode != http.StatusCreated {
		return fmt.Errorf("an append's status is %d", resp.StatusCode)
	}
	return nil
}

func (r *audience) request(ctx context.Context, method, query string, body io.Reader) (*http.Request, error) {
	req, err := http.NewRequestWithContext(ctx, method, r.spec.URL+"/v1/apps/"+r.spec.App+"/events"+query, body)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Authorization", "Bearer "+r.spec.Token)
	return req, nil
}

// follow notes the events of one tail, which must come in order.
type follow struct {
	r    *audience
	last int // -1 at first
}

var errOrder = errors.New("a tail has missed an event or got one twice")

func (f *follow) take(text []byte) error {
	_, digits, ok := bytes.Cut(text, []byte(`"id":"`+tailEvent))
	if !ok {
		return nil
	}
	at := time.Now()
	if len(digits) < 9 {
		return errors.New("an event is cut")
	}
	n, err := strconv.Atoi(string(digits[:9]))
	if err != nil {
		return err
	}
	if f.last >= 0 && n != f.last+1 {
		return fmt.Errorf("%w: %d after %d", errOrder, n, f.last)
	}
	f.last = n
	select {
	case f.r.arrived <- arrival{n, at}:
		return nil
	case <-f.r.ended.Done():
		return f.r.ended.Err()
	}
}

// eventStream opens server-sent events on a connection of its own. The tail is
// open when its first line is there.
func (r *audience) eventStream(ctx, life context.Context) (func() error, error) { //nolint:revive // two lives: opening, and the tail's
	req, err := r.request(life, http.MethodGet, "?after=latest", nil)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Accept", "text/event-stream")
	transport := &http.Transport{TLSClientConfig: r.tls, ReadBufferSize: 4 << 10}
	if r.spec.Form == formHTTP2 {
		transport.TLSClientConfig, transport.ForceAttemptHTTP2 = r.tls.Clone(), true
		transport.TLSClientConfig.NextProtos = []string{"h2"}
	}
	resp, err := transport.RoundTrip(req) //nolint:bodyclose // closed by the function that is returned
	if err != nil {
		return nil, err
	}
	if (resp.ProtoMajor == 2) != (r.spec.Form == formHTTP2) {
		_ = resp.Body.Close()
		return nil, fmt.Errorf("open a tail: the protocol is %s", resp.Proto)
	}
	in := bufio.NewReaderSize(resp.Body, 4<<10)
	if _, err := in.ReadSlice('\n'); err != nil || resp.StatusCode != http.StatusOK || ctx.Err() != nil {
		_ = resp.Body.Close()
		return nil, fmt.Errorf("open a tail: status %d: %w", resp.StatusCode, errors.Join(err, ctx.Err()))
	}
	f := &follow{r: r, last: -1}
	return func() error {
		defer transport.CloseIdleConnections()
		defer func() { _ = resp.Body.Close() }()
		for {
			line, err := in.ReadSlice('\n')
			if err != nil {
				return err
			}
			if bytes.HasPrefix(line, []byte("data: ")) {
				if err := f.take(line); err != nil {
					return err
				}
			}
		}
	}, nil
}

func (r *audience) socket(ctx, life context.Context) (func() error, error) { //nolint:revive // as above
	transport := &http.Transport{TLSClientConfig: r.tls}
	var conn *websocket.Conn
	var err error
	fips140.WithoutEnforcement(func() { // the handshake has SHA-1
		conn, _, err = websocket.Dial(ctx, strings.Replace(r.spec.URL, "https", "wss", 1)+"/v1/apps/"+r.spec.App+"/events?after=latest", //nolint:bodyclose // Dial has replaced it
			&websocket.DialOptions{HTTPClient: &http.Client{Transport: transport}, HTTPHeader: http.Header{"Authorization": {"Bearer " + r.spec.Token}}})
	})
	if err != nil {
		return nil, err
	}
	f := &follow{r: r, last: -1}
	return func() error {
		defer func() { _ = conn.CloseNow() }()
		for {
			_, text, err := conn.Read(life)
			if err != nil {
				return err
			}
			if err := f.take(text); err != nil {
				return err
			}
		}
	}, nil
}
