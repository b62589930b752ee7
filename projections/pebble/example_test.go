package pebble_test

import (
	"fmt"
	"log"
	"os"
	"path/filepath"

	"github.com/cofferdb/coffer/projections"
	"github.com/cofferdb/coffer/projections/pebble"
)

func Example() {
	dir, err := os.MkdirTemp("", "views")
	if err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(dir)

	store, err := pebble.Open(pebble.Options{Dir: filepath.Join(dir, "eu")})
	if err != nil {
		log.Fatal(err) // ErrCorrupt: delete the folder, the views are rebuilt
	}
	defer store.Close()

	err = store.Update(func(txn projections.Txn) error {
		txn.Set([]byte("b"), []byte("second"))
		txn.Set([]byte("a"), []byte("first"))
		return nil
	})
	if err != nil {
		log.Fatal(err)
	}
	err = store.View(func(r projections.Reader) error {
		c := r.Iterate([]byte("a"), nil, false)
		defer c.Close()
		for c.Next() {
			fmt.Printf("%s %s\n", c.Key(), c.Value())
		}
		return c.Close()
	})
	if err != nil {
		log.Fatal(err)
	}
	// Output:
	// a first
	// b second
}
