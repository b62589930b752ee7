package journal_test

import (
	"bytes"
	"errors"
	"fmt"
	"testing"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/kms"
)

// TestSweepIsOfOneRow: what is left of a row lies between the messages of other
// rows, and a sweep takes none of those.
func TestSweepIsOfOneRow(t *testing.T) {
	w := begin(t, t.TempDir(), false, nil)
	rows := rowsOn(t, w).(*journal.Rows)
	js, err := jetstream.New(w.nc)
	if err != nil {
		t.Fatal(err)
	}
	var alone []string // each the only revision of its row
	publish := func(name, value string) {
		t.Helper()
		// Past Rows, as by a process that was killed before it erased.
		if _, err := js.Publish(t.Context(), "$KV."+journal.KeyringBucket(region().ID)+"."+name, []byte(value)); err != nil {
			t.Fatal(err)
		}
		between := fmt.Sprintf("app.alone%d", len(alone))
		if _, err := rows.Create(t.Context(), between, []byte(between)); err != nil {
			t.Fatal(err)
		}
		alone = append(alone, between)
	}
	for revision := range 3 {
		for i := range 3 {
			publish(fmt.Sprintf("app.left%d", i), fmt.Sprintf("row %d revision %d", i, revision))
		}
	}
	if err := rows.Sweep(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, name := range alone {
		if row, err := rows.Load(t.Context(), name); err != nil || string(row.Value) != name {
			t.Errorf("after the sweep row %s is %q, %v", name, row.Value, err)
		}
	}
	for i := range 3 {
		row, err := rows.Load(t.Context(), fmt.Sprintf("app.left%d", i))
		if err != nil || string(row.Value) != fmt.Sprintf("row %d revision 2", i) {
			t.Errorf("after the sweep row %d is %q, %v", i, row.Value, err)
		}
		for revision := range 2 {
			if search(t, w.dir, fmt.Appendf(nil, "row %d revision %d", i, revision)) {
				t.Errorf("row %d is not swept of revision %d", i, revision)
			}
		}
	}
}

// TestUpdateGroup replaces rows together: each is durable or refused, and the
// bytes before are gone after a sweep, and after the row's next update.
func TestUpdateGroup(t *testing.T) {
	for name, always := range map[string]bool{"own sync": false, "sync always": true} {
		t.Run(name, func(t *testing.T) {
			const n = 40
			w := begin(t, t.TempDir(), always, nil)
			rows := rowsOn(t, w).(*journal.Rows)
			value := func(i, version int) []byte { return fmt.Appendf(nil, "row %d version %d.", i, version) }
			revisions := make([]uint64, n)
			var err error
			for i := range n {
				if revisions[i], err = rows.Create(t.Context(), fmt.Sprint("app.", i), value(i, 0)); err != nil {
					t.Fatal(err)
				}
			}
			for version := 1; version <= 10; version++ {
				updates := make([]kms.RowUpdate, 0, n+2)
				for i := range n {
					updates = append(updates, kms.RowUpdate{Name: fmt.Sprint("app.", i), Value: value(i, version), Revision: revisions[i]})
				}
				updates = append(updates,
					kms.RowUpdate{Name: "app.0", Value: []byte("overtaken"), Revision: revisions[0] + 1_000_000},
					kms.RowUpdate{Name: "app.none", Value: []byte("none"), Revision: 0})
				for i, err := range rows.UpdateGroup(t.Context(), updates) {
					if wrong := i >= n; wrong != errors.Is(err, kms.ErrRowConflict) || !wrong && err != nil {
						t.Fatalf("version %d, update %d: %v", version, i, err)
					}
				}
				for i := range n {
					row, err := rows.Load(t.Context(), fmt.Sprint("app.", i))
					if err != nil || !bytes.Equal(row.Value, value(i, version)) || row.Revision <= revisions[i] {
						t.Fatalf("row %d is %q, %v", i, row.Value, err)
					}
					revisions[i] = row.Revision
				}
			}
			if _, err := rows.Update(t.Context(), "app.7", value(7, 11), revisions[7]); err != nil {
				t.Fatal(err)
			}
			for version := range 11 {
				if search(t, w.dir, value(7, version)) {
					t.Errorf("version %d is there after an update", version)
				}
			}
			if err := rows.Sweep(t.Context()); err != nil {
				t.Fatal(err)
			}
			for version := range 10 {
				for i := range 4 {
					if search(t, w.dir, value(i, version)) {
						t.Errorf("row %d version %d is there after a sweep", i, version)
					}
				}
			}
		})
	}
}

// TestUpdateGroupAmongOthers: rows that are refused in the middle and at the end
// of a group are told, and the others are stored, while somebody else's rows lie
// between them.
func TestUpdateGroupAmongOthers(t *testing.T) {
	const n = 600 // three requests
	w := begin(t, t.TempDir(), false, nil)
	rows := rowsOn(t, w).(*journal.Rows)
	var updates []kms.RowUpdate
	for i := range n {
		name := fmt.Sprintf("app.group%d", i)
		revision, err := rows.Create(t.Context(), name, []byte("before"))
		if err != nil {
			t.Fatal(err)
		}
		updates = append(updates, kms.RowUpdate{Name: name, Value: fmt.Appendf(nil, "row %d", i), Revision: revision})
	}
	// Of the first and the third request the last one too; the second is read again
	// by its sequence, with a hole.
	refused := map[int]bool{0: true, 100: true, 249: true, 300: true, n - 1: true}
	for i := range refused {
		if _, err := rows.Update(t.Context(), updates[i].Name, []byte("of another"), updates[i].Revision); err != nil {
			t.Fatal(err)
		}
	}
	stop, ended := make(chan struct{}), make(chan error, 1)
	go func() {
		other := rowsOn(t, w)
		for i := 0; ; i++ {
			select {
			case <-stop:
				ended <- nil
				return
			default:
			}
			if _, err := other.Create(t.Context(), fmt.Sprintf("app.other%d", i), []byte("other")); err != nil {
				ended <- err
				return
			}
		}
	}()
	errs := rows.UpdateGroup(t.Context(), updates)
	close(stop)
	if err := <-ended; err != nil {
		t.Error(err)
	}
	for i, u := range updates {
		row, err := rows.Load(t.Context(), u.Name)
		switch {
		case err != nil:
			t.Error(err)
		case refused[i] && (!errors.Is(errs[i], kms.ErrRowConflict) || string(row.Value) != "of another"):
			t.Errorf("row %d was to be refused: %v, and is %q", i, errs[i], row.Value)
		case !refused[i] && (errs[i] != nil || !bytes.Equal(row.Value, u.Value)):
			t.Errorf("row %d: %v, and is %q", i, errs[i], row.Value)
		}
	}
}
