package callbacks_test

import (
	"context"
	"fmt"

	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/projections"
	"github.com/cofferdb/coffer/projections/callbacks"
	"github.com/cofferdb/coffer/projections/storetest"
)

// A record says that the first event was delivered and that the second waits.
// Usually a projections.Runner reads it from journal.Callbacks.
func Example() {
	ctx := context.Background()
	store := &storetest.Memory{}
	view, err := callbacks.New(callbacks.Config{Store: store})
	if err != nil {
		fmt.Println(err)
		return
	}
	app, endpoint := journal.AppID{1}, journal.EndpointID{2}
	record := journal.Attempts{
		Kind: journal.AttemptsOutcomes, Endpoint: endpoint, Number: 2, Through: 17,
		Entries: []journal.Attempt{
			{Number: 1, Position: 12, State: journal.DeliveryDone, Status: 204, Attempts: 1},
			{Number: 2, Position: 17, State: journal.DeliveryWaiting, Cause: journal.CauseStatus, Status: 503, Attempts: 1, Due: 60_000},
		},
	}
	err = store.Update(func(txn projections.Txn) error {
		return view.Apply(ctx, txn, journal.CallbackStream("eu", 0), []journal.Sealed{{App: app, Sequence: 1, Record: record.Append(nil)}})
	})
	if err != nil {
		fmt.Println(err)
		return
	}
	progress, err := view.Progress(ctx, app, endpoint)
	fmt.Println(progress.Number, progress.Through, progress.Done, progress.Waiting, err)
	err = view.Deliveries(ctx, app, endpoint, callbacks.Query{State: journal.DeliveryWaiting}, func(d callbacks.Delivery) error {
		fmt.Println(d.Number, d.State, d.Cause, d.Status)
		return nil
	})
	fmt.Println(err)
	// Output:
	// 2 17 1 1 <nil>
	// 2 waiting status 503
	// <nil>
}
