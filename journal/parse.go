package journal

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"time"
	"unicode/utf8"

	"github.com/go-json-experiment/json/jsontext"
)

// Limits bound one event. The zero value of each field means its default.
type Limits struct {
	// Bytes is the largest event, as JSON in its canonical form; 64 KiB.
	Bytes int
	// Depth is how deep an event may be nested, itself counted; 32.
	Depth int
	// Text is the longest msg of a txt body in bytes of UTF-8; 5 KiB.
	Text int
	// Bodies is the largest number of bodies of a message; 32.
	Bodies int
	// Future is how far an event's time may lie ahead of the clock; 5 minutes.
	Future time.Duration
}

func (l Limits) withDefaults() Limits {
	def := func(v *int, d int) {
		if *v <= 0 {
			*v = d
		}
	}
	def(&l.Bytes, 64<<10)
	def(&l.Depth, 32)
	def(&l.Text, 5<<10)
	def(&l.Bodies, 32)
	if l.Future <= 0 {
		l.Future = 5 * time.Minute
	}
	return l
}

const (
	sourcePrefix = "/apps/"
	specVersion  = "1.0"
	contentType  = "application/json"

	// maxPointer bounds how much of a caller's member names an error repeats.
	maxPointer = 256
)

// earliest is the first moment that an event may have; what is older is a clock
// that was never set.
func earliest() time.Time { return time.Date(2000, 1, 1, 0, 0, 0, 0, time.UTC) }

// ParseEvent parses a CloudEvent that a caller sends to an app. It is strict:
// duplicate member names, invalid UTF-8, unknown attributes, reserved types and ids, and
// everything over the limits are refused with an [*InputError]. The event is
// complete after [Event.Normalize], which [Journal.Append] calls.
//
// The event does not refer to data.
func ParseEvent(data []byte, app AppID, limits Limits) (Event, error) {
	limits = limits.withDefaults()
	p, err := parseCloudEvent(data, limits, false)
	if err != nil {
		return Event{}, err
	}
	if p.hasSource && p.App != app {
		return Event{}, invalid("/source", "the source names another app than the one that the request is for")
	}
	if p.Type.Reserved() {
		return Event{}, invalid("/type", "events of this type are written by the server only")
	}
	if ReservedID(p.ID) {
		return Event{}, invalid("/id", reservedDetail)
	}
	if err := checkData(p.Type, p.Data, limits); err != nil {
		return Event{}, err
	}
	p.checked = p.mark()
	return p.Event, nil
}

// A Replayed is an event as a replay sends it.
type Replayed struct {
	Event
	App      AppID
	Position Position
}

// ParseReplayed parses an event as a replay, a page or a callback sends it:
// complete, and with its position. Types that only the server writes are
// accepted.
func ParseReplayed(data []byte) (Replayed, error) {
	p, err := parseCloudEvent(data, Limits{Bytes: 1 << 20}.withDefaults(), true)
	if err != nil {
		return Replayed{}, err
	}
	switch {
	case !p.hasSource:
		return Replayed{}, invalid("/source", "the attribute is missing")
	case !p.hasPosition:
		return Replayed{}, invalid("/position", "the attribute is missing")
	case p.ID == "":
		return Replayed{}, invalid("/id", "the attribute is missing")
	case p.Time.IsZero():
		return Replayed{}, invalid("/time", "the attribute is missing")
	}
	return p.Replayed, nil
}

type parsed struct {
	Replayed
	hasSource, hasPosition bool
}

func parseCloudEvent(data []byte, limits Limits, replayed bool) (parsed, error) {
	var p parsed
	if len(bytes.TrimLeft(data, " \t\r\n")) == 0 {
		return p, invalid("", "the event is empty")
	}
	// White space may double an event's size on the wire, no more.
	if len(data) > 2*limits.Bytes {
		return p, tooLarge("", fmt.Sprintf("the event must not be larger than %d bytes", limits.Bytes))
	}
	if !utf8.Valid(data) {
		return p, invalid("", "the event is not valid UTF-8")
	}
	if err := inspect(data, limits.Depth, 0); err != nil {
		return p, err
	}

	r := decoders.Get().(*eventDecoder) //nolint:errcheck,forcetypeassert // nothing else is put
	defer r.put()
	r.buf = *bytes.NewBuffer(data)
	r.dec.Reset(&r.buf)
	err := p.read(&r.dec, limits, replayed)
	return p, err
}

// eventDecoder is a decoder with what it has grown; making one is two thirds of
// the allocations of parsing an event.
type eventDecoder struct {
	buf bytes.Buffer
	dec jsontext.Decoder
}

// The pool holds no state.
var decoders = sync.Pool{New: func() any { return new(eventDecoder) }} //nolint:gochecknoglobals // see above

// put forgets the input and gives the decoder back.
func (r *eventDecoder) put() {
	r.buf = bytes.Buffer{}
	r.dec.Reset(&r.buf)
	decoders.Put(r)
}

func (p *parsed) read(dec *jsontext.Decoder, limits Limits, replayed bool) error {
	tok, err := dec.ReadToken()
	if err != nil {
		return syntaxError(err)
	}
	if tok.Kind() != '{' {
		return invalid("", "an event must be a JSON object")
	}
	for {
		tok, err = dec.ReadToken()
		if err != nil {
			return syntaxError(err)
		}
		if tok.Kind() == '}' {
			break
		}
		// The token is only good until the next one is read.
		pointer := attributeOf(tok.String())
		if pointer == "" || pointer == "/position" && !replayed {
			return unknownAttribute(tok.String())
		}
		raw, err := dec.ReadValue()
		if err != nil {
			return syntaxError(err)
		}
		if raw.Kind() == 'n' {
			// CloudEvents JSON format, section 2.2: null means unset.
			continue
		}
		if err := p.set(pointer, raw, limits); err != nil {
			return err
		}
	}
	if _, err := dec.ReadToken(); !errors.Is(err, io.EOF) {
		return invalid("", "there is something after the event")
	}
	if p.Type == 0 {
		return invalid("/type", "the attribute is missing")
	}
	return nil
}

// attributeOf returns the JSON pointer of a known attribute, as a constant so
// that it costs no allocation, or "".
func attributeOf(name string) string {
	switch name {
	case "specversion":
		return "/specversion"
	case "id":
		return "/id"
	case "source":
		return "/source"
	case "type":
		return "/type"
	case "time":
		return "/time"
	case "conversation":
		return "/conversation"
	case "conversationtype":
		return "/conversationtype"
	case "sender":
		return "/sender"
	case "recipient":
		return "/recipient"
	case "target":
		return "/target"
	case "datacontenttype":
		return "/datacontenttype"
	case "data":
		return "/data"
	case "position":
		return "/position"
	}
	return ""
}

func unknownAttribute(name string) error {
	pointer := pointerText("/" + escapePointer(name))
	switch name {
	case "position":
		return invalid(pointer, "the position is given by the server")
	case "data_base64":
		return invalid(pointer, "binary data is not accepted; put a JSON object into data")
	}
	return invalid(pointer, "unknown attribute; what is your own belongs into data.ext")
}

func (p *parsed) set(pointer string, raw jsontext.Value, limits Limits) error {
	if pointer == "/data" {
		if raw.Kind() != '{' {
			return invalid(pointer, "data must be a JSON object")
		}
		canonical, err := canonicalData(raw, limits, true)
		if err != nil {
			return err
		}
		p.Data = canonical
		return nil
	}
	if raw.Kind() != '"' {
		return invalid(pointer, "the attribute must be a string")
	}
	if len(raw) > 6*maxDirectID+2 {
		return tooLarge(pointer, "the attribute is too long")
	}
	s := string(raw[1 : len(raw)-1])
	var err error
	if strings.Contains(s, `\`) {
		text, err := jsontext.AppendUnquote(nil, raw)
		if err != nil {
			return syntaxError(err)
		}
		s = string(text)
	}
	switch pointer {
	case "/specversion":
		if s != specVersion {
			return invalid(pointer, "only CloudEvents 1.0 is known")
		}
	case "/source":
		id, ok := strings.CutPrefix(s, sourcePrefix)
		if !ok {
			return invalid(pointer, "a source is /apps/ and the app's id")
		}
		if p.App, err = ParseAppID(id); err != nil {
			return invalid(pointer, "a source is /apps/ and the app's id of 32 hex digits")
		}
		p.hasSource = true
	case "/datacontenttype":
		if s != contentType {
			return invalid(pointer, "data must be of the type application/json")
		}
	case "/type":
		if p.Type, err = ParseType(s); err != nil {
			return invalid(pointer, "not a known type of event")
		}
	case "/time":
		if p.Time, err = parseTime(s); err != nil {
			return err
		}
	case "/conversationtype":
		if p.ConversationType, err = ParseConversationType(s); err != nil {
			return invalid(pointer, "not direct, group or room")
		}
	case "/position":
		if p.Position, err = ParsePosition(s); err != nil {
			return invalid(pointer, "not a decimal number of 64 bits")
		}
		p.hasPosition = true
	case "/id":
		p.ID = s
		return checkAt(pointer, s, idOfEvent)
	case "/conversation":
		p.Conversation = s
		return checkAt(pointer, s, idOfConversation)
	case "/sender":
		p.Sender = s
		return checkAt(pointer, s, idOfUser)
	case "/recipient":
		p.Recipient = s
		return checkAt(pointer, s, idOfUser)
	case "/target":
		p.Target = s
		return checkAt(pointer, s, idOfEvent)
	}
	return nil
}

func checkAt(pointer, s string, kind idKind) error {
	if err := checkID(s, kind); err != nil {
		err.Pointer = pointer
		return err
	}
	return nil
}

// parseTime is strict where package time is lenient: it takes a comma for the
// point of a fraction.
func parseTime(s string) (time.Time, error) {
	var t time.Time
	if err := t.UnmarshalText([]byte(s)); err != nil || strings.Contains(s, ",") {
		return t, invalid("/time", "not a time as RFC 3339 has it")
	}
	t = t.UTC().Truncate(time.Millisecond)
	if t.Before(earliest()) {
		return t, &InputError{Pointer: "/time", Detail: "the time lies before the year 2000", class: ErrTimeRange}
	}
	if t.Year() > 9999 {
		return t, &InputError{Pointer: "/time", Detail: "the time lies after the year 9999", class: ErrTimeRange}
	}
	return t, nil
}

// syntaxError turns an error of jsontext into one that repeats no input.
func syntaxError(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return invalid("", "the JSON text ends early")
	}
	var syn *jsontext.SyntacticError
	if !errors.As(err, &syn) {
		return invalid("", "not valid JSON")
	}
	pointer := pointerText(string(syn.JSONPointer))
	switch {
	case errors.Is(syn.Err, io.ErrUnexpectedEOF):
		return invalid(pointer, "the JSON text ends early")
	case errors.Is(syn.Err, jsontext.ErrDuplicateName):
		return invalid(pointer, "the member name appears twice in its object")
	case strings.Contains(syn.Err.Error(), "surrogate"):
		return invalid(pointer, "an escape names half of a surrogate pair")
	}
	return invalid(pointer, fmt.Sprintf("not valid JSON at byte %d", syn.ByteOffset))
}

// pointerText bounds a pointer that repeats names the caller chose, and leaves
// out what would not print.
func pointerText(pointer string) string {
	if len(pointer) > maxPointer {
		pointer = pointer[:maxPointer]
	}
	return strings.Map(func(r rune) rune {
		if r < 0x20 || r == 0x7f || r == utf8.RuneError || 0x80 <= r && r < 0xa0 || isBidi(r) || isInvisible(r) {
			return '?'
		}
		return r
	}, pointer)
}

func escapePointer(name string) string {
	return strings.NewReplacer("~", "~0", "/", "~1").Replace(name)
}
