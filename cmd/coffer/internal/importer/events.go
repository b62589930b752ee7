package importer

import (
	"bytes"

	"github.com/cofferdb/coffer/journal"
)

// trailer begins the last line of a replay that was kept as it came.
const trailer = `{"end":`

// ParseEvent makes an event of a line of an export or a replay. Its app and its
// position are those of where it came from, and are left behind.
func ParseEvent(line []byte) (journal.Event, error) {
	if bytes.HasPrefix(line, []byte(trailer)) {
		return journal.Event{}, ErrNoEvent
	}
	e, err := journal.ParseReplayed(line)
	if err != nil {
		return journal.Event{}, err
	}
	if e.Type.Reserved() {
		return journal.Event{}, ErrServer
	}
	return e.Event, nil
}
