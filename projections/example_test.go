package projections_test

import (
	"context"
	"encoding/binary"
	"fmt"

	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/projections"
	"github.com/cofferdb/coffer/projections/storetest"
)

// counts is a view that holds how many records each app has. It sees sealed
// records only, and needs no more.
type counts struct{}

func (counts) Name() string   { return "counts" }
func (counts) Format() uint32 { return 1 }
func (counts) Tables() []byte { return []byte{'n'} }

func (counts) Apply(_ context.Context, txn projections.Txn, _ string, batch []journal.Sealed) error {
	for _, r := range batch {
		n, err := count(txn, r.App)
		if err != nil {
			return err
		}
		txn.Set(countKey(r.App), binary.BigEndian.AppendUint64(nil, n+1))
	}
	return nil
}

func countKey(app journal.AppID) []byte { return append([]byte{'n'}, app[:]...) }

func count(r projections.Reader, app journal.AppID) (uint64, error) {
	v, ok, err := r.Get(nil, countKey(app))
	if err != nil || !ok {
		return 0, err
	}
	return binary.BigEndian.Uint64(v), nil
}

// A runner keeps a view in step with the journal. The journal here is one in
// memory; a *journal.Journal is used in the same way.
func Example() {
	app := appN(1)
	records := newSource("s1")
	store := &storetest.Memory{}
	runner, err := projections.NewRunner(projections.RunnerConfig{
		Journal: records, Store: store, Projections: []projections.Projection{counts{}},
	})
	if err != nil {
		fmt.Println(err)
		return
	}
	ctx, stop := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- runner.Run(ctx) }()

	position := records.append("s1", app, "sealed", "sealed", "sealed")
	// Whoever appended at the position reads what it wrote.
	if err := runner.Wait(ctx, app, position); err != nil {
		fmt.Println(err)
	}
	err = store.View(func(r projections.Reader) error {
		n, err := count(r, app)
		fmt.Println("records:", n)
		return err
	})
	stop()
	fmt.Println(err, <-done)
	// Output:
	// records: 3
	// <nil> <nil>
}
