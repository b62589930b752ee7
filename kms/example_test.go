package kms_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/cofferdb/coffer/kms"
	"github.com/cofferdb/coffer/kms/kmstest"
	"github.com/cofferdb/coffer/kms/local"
)

func Example() {
	ctx := context.Background()
	dir, err := os.MkdirTemp("", "coffer")
	if err != nil {
		panic(err)
	}
	defer os.RemoveAll(dir)
	provider, err := local.Open(ctx, local.Options{Path: filepath.Join(dir, "key.json"), Create: true})
	if err != nil {
		panic(err)
	}
	// A real store of rows is durable; package journal has one.
	ring, err := kms.NewKeyring(kms.Config{Region: "eu", Provider: provider, Rows: kmstest.NewRows()})
	if err != nil {
		panic(err)
	}
	defer ring.Close()
	if err := ring.CreateApp(ctx, "myapp"); err != nil {
		panic(err)
	}
	tagger, err := ring.Tagger(ctx, "myapp")
	if err != nil {
		panic(err)
	}
	alice := tagger.Tag(kms.KindSubject, "alice")
	today := time.Now().UTC().Truncate(24 * time.Hour)
	epoch := kms.Epoch{Class: "pro/0", From: today, Until: today.AddDate(0, 0, 1), Expires: today.AddDate(0, 0, 91)}

	key, err := ring.Sealer(ctx, "myapp", epoch, alice)
	if err != nil {
		panic(err)
	}
	envelope := key.Seal(nil, []byte("where it belongs"), []byte("hello"))

	header, err := kms.ParseHeader(envelope)
	if err != nil {
		panic(err)
	}
	key, err = ring.Opener(ctx, "myapp", header.Epoch, header.Subject)
	if err != nil {
		panic(err)
	}
	text, err := key.Open(nil, []byte("where it belongs"), envelope)
	fmt.Printf("%s, %v\n", text, err)

	if err := ring.EraseSubject(ctx, "myapp", alice); err != nil {
		panic(err)
	}
	_, err = ring.Opener(ctx, "myapp", header.Epoch, header.Subject)
	fmt.Println(err != nil)
	// Output:
	// hello, <nil>
	// true
}
