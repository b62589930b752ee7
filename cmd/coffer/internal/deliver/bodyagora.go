package deliver

import (
	"fmt"
	"strconv"
	"strings"

	"github.com/cofferdb/coffer/cmd/coffer/internal/agora"
	"github.com/cofferdb/coffer/cmd/coffer/internal/endpoints"
	"github.com/cofferdb/coffer/journal"
)

// appendAgora appends an event in the form of Agora Chat's post-send callbacks.
// The same event has the same callId at each attempt.
func appendAgora(dst []byte, e *endpoints.Endpoint, m *Message) ([]byte, error) {
	c := agora.Callback{CallID: e.Agora.AppKey + "_" + uuidOf(m.ID), Secret: string(e.Agora.Secret)}
	place := `{"position":"` + m.Position.String() + `"`
	if m.Number > 0 { // a replay has none
		place += `,"number":"` + strconv.FormatUint(m.Number, 10) + `"`
	}
	if m.Event == nil {
		c.Delivery = []byte(place + `,"gone":"` + m.Gone + `"}`)
		return agora.AppendGone(dst, m.ID, m.Stored.UnixMilli(), c)
	}
	event, err := journal.ParseReplayed(placed(m))
	if err != nil {
		return dst, fmt.Errorf("event at position %s: %w", m.Position, err)
	}
	c.Delivery = []byte(place + `}`)
	out, ok, err := agora.AppendCallback(dst, event.Event, c)
	if err == nil && !ok {
		err = fmt.Errorf("%s has no form in the mode agora", m.Type)
	}
	return out, err
}

// placed is the event as a replay gives it.
func placed(m *Message) []byte {
	text := make([]byte, 0, len(m.Event)+40)
	text = append(text, m.Event[:len(m.Event)-1]...)
	return append(text, `,"position":"`+m.Position.String()+`"}`...)
}

// uuidOf writes the 32 hex digits of a webhook-id as a UUID.
func uuidOf(id string) string {
	hex := strings.TrimPrefix(id, "msg_")
	if len(hex) != 32 {
		return hex
	}
	return hex[:8] + "-" + hex[8:12] + "-" + hex[12:16] + "-" + hex[16:20] + "-" + hex[20:]
}
