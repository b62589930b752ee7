package storetest

import (
	"bytes"
	"errors"
	"fmt"
	"sync"
	"testing"

	"github.com/cofferdb/coffer/projections"
)

var errTest = errors.New("of the test")

func testErrorRollsBack(t *testing.T, s projections.Store) {
	update(t, s, func(txn projections.Txn) { txn.Set([]byte("a"), []byte("1")) })
	err := s.Update(func(txn projections.Txn) error {
		txn.Set([]byte("a"), []byte("2"))
		txn.Set([]byte("b"), []byte("2"))
		txn.DeleteRange([]byte("a"), []byte("aa"))
		return errTest
	})
	if !errors.Is(err, errTest) {
		t.Errorf("Update = %v, want the function's error", err)
	}
	if err := s.View(func(projections.Reader) error { return errTest }); !errors.Is(err, errTest) {
		t.Errorf("View = %v, want the function's error", err)
	}
	view(t, s, func(r projections.Reader) { wantScan(t, r, "", "", pair{"a", "1"}) })
	update(t, s, func(txn projections.Txn) { wantScan(t, txn, "", "", pair{"a", "1"}) })
}

func testPanicRollsBack(t *testing.T, s projections.Store) {
	update(t, s, func(txn projections.Txn) { txn.Set([]byte("a"), []byte("1")) })
	func() {
		defer func() {
			if recover() == nil {
				t.Error("the panic did not reach the caller")
			}
		}()
		_ = s.Update(func(txn projections.Txn) error {
			txn.Set([]byte("a"), []byte("2"))
			panic(errTest)
		})
	}()
	view(t, s, func(r projections.Reader) { wantScan(t, r, "", "", pair{"a", "1"}) })
	update(t, s, func(txn projections.Txn) { txn.Set([]byte("b"), []byte("1")) })
	view(t, s, func(r projections.Reader) { wantScan(t, r, "", "", pair{"a", "1"}, pair{"b", "1"}) })
}

func testSnapshot(t *testing.T, s projections.Store) {
	update(t, s, func(txn projections.Txn) {
		txn.Set([]byte("a"), []byte("1"))
		txn.Set([]byte("b"), []byte("1"))
	})
	begun, changed := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(changed)
		<-begun
		if err := s.Update(func(txn projections.Txn) error {
			txn.Set([]byte("a"), []byte("2"))
			txn.DeleteRange([]byte("b"), []byte("c"))
			txn.Set([]byte("d"), []byte("2"))
			return nil
		}); err != nil {
			t.Errorf("Update: %v", err)
		}
	}()
	view(t, s, func(r projections.Reader) {
		wantAbsent(t, r, "c") // the first read fixes what is seen
		close(begun)
		<-changed
		wantGet(t, r, "a", "1")
		wantAbsent(t, r, "d")
		wantScan(t, r, "", "", pair{"a", "1"}, pair{"b", "1"})
	})
	view(t, s, func(r projections.Reader) {
		wantScan(t, r, "", "", pair{"a", "2"}, pair{"d", "2"})
	})
}

func testSerial(t *testing.T, s projections.Store) {
	const workers, rounds = 8, 50
	var wg sync.WaitGroup
	for range workers {
		wg.Go(func() {
			for range rounds {
				if err := s.Update(func(txn projections.Txn) error {
					v, _, err := txn.Get(nil, []byte("n"))
					txn.Set([]byte("n"), append(v, 'x'))
					return err
				}); err != nil {
					t.Errorf("Update: %v", err)
				}
			}
		})
	}
	wg.Wait()
	view(t, s, func(r projections.Reader) {
		if v, _, _ := r.Get(nil, []byte("n")); len(v) != workers*rounds {
			t.Errorf("%d of %d increments are there", len(v), workers*rounds)
		}
	})
}

// testConcurrent has readers check that two keys, always changed together, are
// never seen apart.
func testConcurrent(t *testing.T, s projections.Store) {
	var readers, writers sync.WaitGroup
	stop := make(chan struct{})
	for range 4 {
		readers.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				if err := s.View(func(r projections.Reader) error {
					a, _, err := r.Get(nil, []byte("a"))
					if err != nil {
						return err
					}
					z, _, err := r.Get(nil, []byte("z"))
					if err != nil {
						return err
					}
					if !bytes.Equal(a, z) {
						t.Errorf("half a transaction is visible: %q, %q", a, z)
					}
					return nil
				}); err != nil {
					t.Errorf("View: %v", err)
				}
			}
		})
	}
	for w := range 2 {
		writers.Go(func() {
			for i := range 200 {
				v := fmt.Appendf(nil, "%d-%d", w, i)
				if err := s.Update(func(txn projections.Txn) error {
					txn.Set([]byte("a"), v)
					txn.Set([]byte("z"), v)
					return nil
				}); err != nil {
					t.Errorf("Update: %v", err)
				}
			}
		})
	}
	writers.Wait()
	close(stop)
	readers.Wait()
}

func testDurable(t *testing.T, open func(*testing.T) projections.Store) {
	s := open(t)
	update(t, s, func(txn projections.Txn) {
		for i := range 1000 {
			txn.Set(fmt.Appendf(nil, "k%04d", i), []byte("1"))
		}
	})
	for round := range 3 {
		if err := s.Close(); err != nil {
			t.Fatalf("Close: %v", err)
		}
		s = open(t)
		from, to := fmt.Sprintf("k%03d", round), fmt.Sprintf("k%03d", round+1)
		view(t, s, func(r projections.Reader) {
			if n := len(scan(t, r, "", "", false)); n != 1000-10*round {
				t.Fatalf("%d keys after %d restarts", n, round+1)
			}
		})
		update(t, s, func(txn projections.Txn) { txn.DeleteRange([]byte(from), []byte(to)) })
	}
	if err := s.Close(); err != nil {
		t.Fatalf("Close: %v", err)
	}
}
