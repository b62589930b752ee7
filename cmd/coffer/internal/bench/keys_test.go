package bench

import (
	"errors"
	"path/filepath"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-json-experiment/json"

	"github.com/cofferdb/coffer/kms"
	"github.com/cofferdb/coffer/kms/kmstest"
	"github.com/cofferdb/coffer/kms/local"
)

func TestKeys(t *testing.T) {
	r, err := Run(t.Context(), Options{
		Name: "keys", Dir: t.TempDir(), Rounds: 2, Size: 300, Rows: 2500, Messages: 2000, Day: 500 * time.Millisecond,
	})
	if err != nil {
		t.Fatal(err)
	}
	text, err := json.Marshal(r)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%s", text)
	if r.Name != "keys" || r.Unit == "" || r.Rounds != 2 || len(r.Cases) != 4 || r.Ratio != r.Cases[0].Ratio {
		t.Error("the report is not complete")
	}
	for _, c := range r.Cases {
		if c.Ours <= 0 || c.Raw <= 0 || c.Ratio <= 0 || len(c.OursRounds) != 2 || len(c.RawRounds) != 2 {
			t.Errorf("the case is not complete: %+v", c)
		}
	}
	if r.Cases[0].Paired <= 0 {
		t.Error("the rewrap has no ratio of its rounds")
	}
	if turn := rewrapTurn(100_000); turn != 10_000 || rewrapTurn(2500) != 2000 || rewrapTurn(1) != 2000 {
		t.Errorf("a turn of %d of 100,000 rows", turn)
	}
	if day := r.Cases[1].Beside[0].Value; day > callsAtMost {
		t.Errorf("%v calls in a day", day)
	}
	if cold := r.Cases[2]; cold.Ours != 1 {
		t.Errorf("%v unwraps per app key", cold.Ours)
	}
	if allocations := r.Cases[3].Beside[0]; allocations.Value != 0 {
		t.Errorf("%s: %v", allocations.Name, allocations.Value)
	}
}

func TestKeysRefused(t *testing.T) {
	if _, err := Run(t.Context(), Options{Name: "keys", Dir: t.TempDir(), KMS: "abacus:x"}); !errors.Is(err, ErrUnknown) {
		t.Errorf("an unknown provider: %v", err)
	}
}

// TestCallsOfADay is the benchmark's day with the real lifetimes, on a clock that
// jumps: a million messages of one app cost at most a hundred calls.
func TestCallsOfADay(t *testing.T) {
	const messages = 1_000_000
	counter := &counter{n: map[string]int{}}
	provider, err := local.Open(t.Context(), local.Options{Path: filepath.Join(t.TempDir(), "kek.json"), Create: true, Observe: counter.observe})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = provider.Close() }()
	const days = 5
	sum := 0
	for range days {
		synctest.Test(t, func(t *testing.T) {
			ring, err := kms.NewKeyring(kms.Config{Region: "eu", Provider: provider, Rows: kmstest.NewRows()})
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = ring.Close() }()
			if err := ring.CreateApp(t.Context(), "app"); err != nil {
				t.Fatal(err)
			}
			counter.take()
			const minutes = 24 * 60
			plaintext, dst := make([]byte, 100), make([]byte, 0, 300)
			for minute := range minutes {
				for i := minute * messages / minutes; i < (minute+1)*messages/minutes; i++ {
					from := time.Now().Truncate(6 * time.Hour)
					key, err := ring.Sealer(t.Context(), "app", kms.Epoch{Class: "free/0", From: from, Until: from.Add(6 * time.Hour), Expires: from.Add(96 * time.Hour)}, kms.Tag{1, byte(i % 16)})
					if err != nil {
						t.Fatal(err)
					}
					dst = key.Seal(dst[:0], nil, plaintext)
				}
				time.Sleep(time.Minute)
			}
			total := 0
			counts := counter.take()
			for _, n := range counts {
				total += n
			}
			t.Logf("%d calls: %v", total, counts)
			sum += total
		})
	}
	// The times of the revalidations are random, and a single day may have a
	// call or two more.
	if sum > days*callsAtMost || sum < days*80 {
		t.Errorf("%d calls in %d days of %d messages", sum, days, messages)
	}
}
