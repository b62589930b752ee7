package journal

import (
	"bytes"
	"testing"

	"github.com/cofferdb/coffer/kms"
)

func sampleAttempts() []*Attempts {
	return []*Attempts{
		{Kind: AttemptsTaken, Millis: 1_700_000_000_000, Endpoint: EndpointID{1}, Token: 7},
		{
			Kind: AttemptsOutcomes, Millis: 1, ID: [16]byte{2}, Endpoint: EndpointID{3}, Number: 12, Through: 4711,
			Entries: []Attempt{
				{Number: 11, Position: 4700, State: DeliveryDone, Status: 204, Attempts: 1, Millis: 12, Arrived: 5},
				{Number: 12, Position: 4711, Conversation: kms.Tag{9}, State: DeliveryWaiting, Cause: CauseTimeout, Attempts: 3, Due: 99, Arrived: 6},
			},
		},
		{Kind: AttemptsReplay, Replay: [16]byte{4}, Entries: []Attempt{{Number: 5, Position: 6, State: DeliveryParked, Attempts: 1}}},
	}
}

// TestAttempts writes and reads records, and refuses what is none: cut anywhere,
// of another version or kind, with states that are not known.
func TestAttempts(t *testing.T) {
	t.Parallel()
	for _, a := range sampleAttempts() {
		record := a.Append(nil)
		got, envelope, err := ParseAttempts(append(bytes.Clone(record), "envelope"...))
		if err != nil || string(envelope) != "envelope" || !bytes.Equal(got.Append(nil), record) {
			t.Errorf("kind %d: %+v, %q, %v", a.Kind, got, envelope, err)
		}
		for n := range record {
			if _, _, err := ParseAttempts(record[:n]); err == nil {
				t.Errorf("kind %d: %d of %d bytes were taken", a.Kind, n, len(record))
			}
		}
		for _, at := range []int{0, 1, 2, 3} {
			wrong := bytes.Clone(record)
			wrong[at] ^= 0x40
			if _, _, err := ParseAttempts(wrong); err == nil {
				t.Errorf("kind %d: byte %d changed was taken", a.Kind, at)
			}
		}
	}
	state := sampleAttempts()[1].Append(nil)
	state[attemptsHead+8+24] = 9
	if _, _, err := ParseAttempts(state); err == nil {
		t.Error("an unknown state was taken")
	}
}

// FuzzParseAttempts has what is taken encode to the same bytes.
func FuzzParseAttempts(f *testing.F) {
	for _, a := range sampleAttempts() {
		f.Add(a.Append(nil))
	}
	f.Fuzz(func(t *testing.T, record []byte) {
		a, envelope, err := ParseAttempts(record)
		if err == nil && !bytes.Equal(append(a.Append(nil), envelope...), record) {
			t.Errorf("%x is read as %+v", record, a)
		}
	})
}
