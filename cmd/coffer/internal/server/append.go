package server

import (
	"bytes"
	"fmt"
	"net/http"
	"strconv"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/cofferdb/coffer/journal"
)

// outcome is what the answer says about one event.
type outcome struct {
	ID       string            `json:"id,omitempty"`
	Position *journal.Position `json:"position,omitempty"`
	Time     string            `json:"time,omitempty"`
	Status   string            `json:"status,omitempty"` // of a batch: created, duplicate, refused
	Problem  *problem          `json:"problem,omitempty"`
}

const timeLayout = "2006-01-02T15:04:05.000Z"

// appendEvents stores one event, or a batch of them.
func (s *Server) appendEvents(c *call) error {
	form, err := s.bodyForm(c.r, c.route.bodies)
	if err != nil {
		return err
	}
	key, err := s.idempotencyKey(c.r)
	if err != nil {
		return err
	}
	body, release, err := s.readBody(c.w, c.r, c.route.limit)
	if err != nil {
		return err
	}
	defer release()
	texts, batch, err := s.split(body, form)
	if err != nil {
		return err
	}
	outcomes, err := s.appendAll(c, texts, key, batch)
	if err != nil {
		return err
	}
	if !batch {
		return s.answerOne(c, outcomes[0])
	}
	return s.answerBatch(c, outcomes)
}

// idempotencyKey returns the header's value, which stands in for the id of an
// event that has none; in a batch, the id is the key, a colon and the index.
func (s *Server) idempotencyKey(r *http.Request) (string, error) {
	values := r.Header.Values("Idempotency-Key")
	if len(values) == 0 {
		return "", nil
	}
	if journal.ReservedID(values[0]) {
		return "", s.invalidHeader(s.kinds.invalidRequest, "Idempotency-Key", "it stands in for an event's id, and "+journal.CheckCallerEventID(values[0]).Error())
	}
	// Room for the index in a batch.
	if len(values) > 1 || journal.CheckEventID(values[0]) != nil || len(values[0]) > journal.MaxID-8 {
		return "", s.invalidHeader(s.kinds.invalidRequest, "Idempotency-Key",
			fmt.Sprintf("an Idempotency-Key is given once and is an event id of at most %d bytes", journal.MaxID-8))
	}
	return values[0], nil
}

// split returns the JSON texts of the events. What is wrong inside one of them
// is found when it is parsed, and is then its own problem and not the batch's.
func (s *Server) split(body []byte, form form) ([][]byte, bool, error) {
	start := bytes.TrimLeft(body, " \t\r\n")
	isArray := len(start) > 0 && start[0] == '['
	switch {
	case bytes.HasPrefix(body, []byte{0x1f, 0x8b}):
		return nil, false, s.invalidBody("", "the body is gzip, which Content-Encoding must say")
	case form == formObject && isArray:
		return nil, false, s.invalidBody("", "this Content-Type is for one event")
	case form == formArray && !isArray:
		return nil, false, s.invalidBody("", "this Content-Type is for an array of events")
	case form == formLines:
		texts, err := s.splitLines(body)
		return texts, true, err
	case isArray:
		texts, err := s.splitArray(body)
		return texts, true, err
	}
	return [][]byte{body}, false, nil
}

func (s *Server) tooMany() error {
	return s.kinds.payloadTooLarge.problem(fmt.Sprintf("more than %d events in one request", s.limits.BatchEvents))
}

func (s *Server) splitLines(body []byte) ([][]byte, error) {
	var texts [][]byte
	for line := range bytes.SplitSeq(body, []byte{'\n'}) {
		if line = bytes.TrimSpace(line); len(line) == 0 {
			continue
		}
		if len(texts) == s.limits.BatchEvents {
			return nil, s.tooMany()
		}
		texts = append(texts, line)
	}
	if len(texts) == 0 {
		return nil, s.invalidBody("", "the body has no event")
	}
	return texts, nil
}

func (s *Server) splitArray(body []byte) ([][]byte, error) {
	malformed := func() error { return s.invalidBody("", "the body is not a JSON array of events") }
	// Names and UTF-8 are checked event by event.
	d := jsontext.NewDecoder(bytes.NewBuffer(body), jsontext.AllowDuplicateNames(true), jsontext.AllowInvalidUTF8(true))
	if _, err := d.ReadToken(); err != nil {
		return nil, malformed()
	}
	var texts [][]byte
	for d.PeekKind() != ']' {
		value, err := d.ReadValue()
		if err != nil {
			return nil, malformed()
		}
		if len(texts) == s.limits.BatchEvents {
			return nil, s.tooMany()
		}
		// The value is a part of body: the decoder reads from a bytes.Buffer.
		texts = append(texts, body[d.InputOffset()-int64(len(value)):d.InputOffset()])
	}
	if _, err := d.ReadToken(); err != nil {
		return nil, malformed()
	}
	if len(bytes.TrimSpace(body[d.InputOffset():])) != 0 {
		return nil, s.invalidBody("", "there is something after the array")
	}
	if len(texts) == 0 {
		return nil, s.invalidBody("", "the array is empty")
	}
	return texts, nil
}

// appendAll parses and appends; the outcomes are in the order of the texts.
func (s *Server) appendAll(c *call, texts [][]byte, key string, batch bool) ([]outcome, error) {
	outcomes := make([]outcome, len(texts))
	events := make([]journal.Event, 0, len(texts))
	places := make([]int, 0, len(texts))
	for i, text := range texts {
		event, err := s.parseEvent(c, text, itemKey(key, i, batch))
		if err != nil {
			outcomes[i] = s.refused(c, event.ID, err)
			continue
		}
		events, places = append(events, event), append(places, i)
	}
	if len(events) == 0 {
		return outcomes, nil
	}
	sent := make(map[int]journal.Event)
	events, places, err := s.askAbout(c, events, places, outcomes, sent)
	if err != nil || len(events) == 0 {
		return outcomes, err
	}
	results, err := s.journal.Append(c.r.Context(), c.app.ID, events...)
	if err != nil {
		return nil, err
	}
	if err := s.appendAgain(c, sent, places, events, results); err != nil {
		return nil, err
	}
	appended := 0
	for n, result := range results {
		if result.Err == nil && !result.Duplicate {
			appended++
		}
		outcomes[places[n]] = s.outcomeOf(c, events[n], result)
	}
	s.meter.Appended(c.app.ID, appended)
	return outcomes, nil
}

func itemKey(key string, i int, batch bool) string {
	if key == "" || !batch {
		return key
	}
	return key + ":" + strconv.Itoa(i)
}

// parseEvent parses an event and checks that the caller may send it. The id is
// returned also when it may not.
func (s *Server) parseEvent(c *call, text []byte, key string) (journal.Event, error) {
	event, err := journal.ParseEvent(text, c.app.ID, s.limits.Event)
	if err != nil {
		return event, err
	}
	if event.ID == "" {
		event.ID = key
	}
	return event, s.maySend(c, &event)
}

func (s *Server) outcomeOf(c *call, event journal.Event, r journal.Result) outcome {
	if r.Err != nil {
		id := r.ID
		if id == "" {
			id = event.ID
		}
		return s.refused(c, id, r.Err)
	}
	o := outcome{ID: r.ID, Position: &r.Position, Time: r.Time.UTC().Format(timeLayout), Status: "created"}
	if r.Duplicate {
		o.Status = "duplicate"
	}
	return o
}

func (s *Server) refused(c *call, id string, err error) outcome {
	p := s.problemOf(err)
	switch p.Code {
	case s.kinds.tooOld.code:
		p.OldestAvailable = s.oldestAvailable(c.app)
	case s.kinds.erased.code:
		// Reading what a user left is 410; sending for one that is gone is 409.
		erased := s.kinds.userErased.problem("the user has been erased; nothing more can be stored for it")
		erased.cause = err
		p = erased
	}
	return outcome{ID: id, Status: "refused", Problem: p}
}

func (s *Server) answerOne(c *call, o outcome) error {
	if o.Problem != nil {
		return o.Problem
	}
	status := http.StatusCreated
	if o.Status == "duplicate" {
		status = http.StatusOK
	}
	c.w.Header().Set("Location", "/v1/apps/"+c.app.ID.String()+"/events/"+o.ID)
	o.Status = ""
	return s.writeJSON(c, status, o)
}

// answerBatch answers 201 when all are stored, 207 when some are. When none is
// and the reason is the server's own, the answer is that reason.
func (s *Server) answerBatch(c *call, outcomes []outcome) error {
	stored, ours := 0, 0
	for _, o := range outcomes {
		switch {
		case o.Problem == nil:
			stored++
		case o.Problem.Status >= http.StatusInternalServerError:
			ours++
			s.log.Warn("event not stored", "request_id", c.id, "problem", o.Problem.Code, "err", o.Problem.cause)
		}
	}
	if ours == len(outcomes) {
		return outcomes[0].Problem
	}
	status := http.StatusCreated
	if stored < len(outcomes) {
		status = http.StatusMultiStatus
	}
	body, err := json.Marshal(struct {
		Data []outcome `json:"data"`
	}{outcomes})
	if err != nil {
		return fmt.Errorf("encoding an answer: %w", err)
	}
	return s.writeBody(c, status, typeJSON, body)
}
