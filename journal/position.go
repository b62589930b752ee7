package journal

import (
	"fmt"
	"strconv"
)

const (
	sequenceBits = 52
	maxSequence  = 1<<sequenceBits - 1

	// MaxGeneration is the highest route generation; an app can change its plan
	// this many times.
	MaxGeneration = 1<<(64-sequenceBits) - 1
)

// A Position is a place in the order of an app's events: the app's route
// generation (12 bits, raised by each plan change) above the sequence in the
// stream that the generation writes to (52 bits). Positions of an app increase
// and are not consecutive; those of two apps cannot be compared. The zero
// Position lies before the first event.
//
// As text a position is decimal, and in JSON it is a string, because a
// JavaScript number loses integers above 2^53.
type Position uint64

// NewPosition returns the position of a sequence in a generation. The two must
// fit in 12 and 52 bits.
func NewPosition(generation uint16, sequence uint64) (Position, error) {
	if generation > MaxGeneration {
		return 0, fmt.Errorf("position: %w: generation %d is over %d", ErrInvalid, generation, MaxGeneration)
	}
	if sequence > maxSequence {
		return 0, fmt.Errorf("position: %w: sequence %d needs more than %d bits", ErrInvalid, sequence, sequenceBits)
	}
	return Position(uint64(generation)<<sequenceBits | sequence), nil
}

// ParsePosition parses the decimal form. It accepts what [Position.String]
// makes and nothing else: no sign, no leading zero, no space.
func ParsePosition(s string) (Position, error) {
	n, err := strconv.ParseUint(s, 10, 64)
	if err != nil || strconv.FormatUint(n, 10) != s {
		return 0, fmt.Errorf("position: %w: not a decimal number of 64 bits", ErrInvalid)
	}
	return Position(n), nil
}

// Generation returns the route generation.
func (p Position) Generation() uint16 { return uint16(p >> sequenceBits) }

// Sequence returns the sequence in the stream of the generation.
func (p Position) Sequence() uint64 { return uint64(p) & maxSequence }

// String returns the decimal form.
func (p Position) String() string { return strconv.FormatUint(uint64(p), 10) }

// AppendText appends the decimal form to dst. It never fails.
func (p Position) AppendText(dst []byte) ([]byte, error) {
	return strconv.AppendUint(dst, uint64(p), 10), nil
}

// MarshalText returns the decimal form, so that JSON has a string.
func (p Position) MarshalText() ([]byte, error) { return p.AppendText(nil) }

// UnmarshalText parses the decimal form.
func (p *Position) UnmarshalText(text []byte) error {
	q, err := ParsePosition(string(text))
	if err != nil {
		return err
	}
	*p = q
	return nil
}
