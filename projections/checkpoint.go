package projections

import (
	"encoding/binary"
	"fmt"
)

// The runner's own keys, see docs/format/views.md. They lie in table 0x00.
const (
	runnerTable    = 0x00
	keyCheckpoint  = 'C'
	keyFormat      = 'F'
	keyRebuild     = 'R'
	keySeal        = 'S'
	checkpointForm = 1
)

// A Checkpoint says how far a stream has been read.
type Checkpoint struct {
	// Incarnation is the stream's random id. A stream that was re-created has
	// another.
	Incarnation string
	// Sequence is the last sequence that was applied.
	Sequence uint64
}

func (c Checkpoint) append(dst []byte) []byte {
	dst = append(dst, checkpointForm)
	dst = binary.BigEndian.AppendUint64(dst, c.Sequence)
	return append(dst, c.Incarnation...)
}

func parseCheckpoint(b []byte) (Checkpoint, error) {
	if len(b) < 9 || b[0] != checkpointForm {
		return Checkpoint{}, fmt.Errorf("%w: checkpoint of %d bytes", ErrCorrupt, len(b))
	}
	return Checkpoint{Sequence: binary.BigEndian.Uint64(b[1:9]), Incarnation: string(b[9:])}, nil
}

// runnerKey is 0x00, the kind, the projection's name, 0x00 and the stream. A
// name has no 0x00 in it, so no key is the beginning of another's.
func runnerKey(kind byte, projection, stream string) []byte {
	key := make([]byte, 0, 3+len(projection)+len(stream))
	key = append(key, runnerTable, kind)
	key = append(key, projection...)
	key = append(key, 0)
	return append(key, stream...)
}

// runnerRange covers the keys of one kind and projection.
func runnerRange(kind byte, projection string) (from, to []byte) {
	from = runnerKey(kind, projection, "")
	to = runnerKey(kind, projection, "")
	to[len(to)-1] = 1
	return from, to
}

func loadUint64(r Reader, key []byte) (uint64, bool, error) {
	v, ok, err := r.Get(nil, key)
	if err != nil || !ok {
		return 0, false, err
	}
	if len(v) != 8 {
		return 0, false, fmt.Errorf("%w: number of %d bytes", ErrCorrupt, len(v))
	}
	return binary.BigEndian.Uint64(v), true, nil
}
