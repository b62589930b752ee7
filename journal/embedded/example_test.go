package embedded_test

import (
	"context"
	"fmt"
	"os"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/cofferdb/coffer/journal/embedded"
)

func Example() {
	if err := storeOne(context.Background()); err != nil {
		fmt.Println(err)
	}
	// Output:
	// on disk: message 1
}

// storeOne publishes a message and returns when it is on disk.
func storeOne(ctx context.Context) error {
	dir, err := os.MkdirTemp("", "embedded-example-")
	if err != nil {
		return err
	}
	defer func() { _ = os.RemoveAll(dir) }()
	server, err := embedded.Start(ctx, embedded.Options{StoreDir: dir})
	if err != nil {
		return err
	}
	defer func() { _ = server.Close() }()
	conn, err := server.Connect()
	if err != nil {
		return err
	}
	defer conn.Close()
	js, err := jetstream.New(conn)
	if err != nil {
		return err
	}
	if _, err := js.CreateStream(ctx, jetstream.StreamConfig{Name: "ships", Subjects: []string{"ship.>"}}); err != nil {
		return err
	}
	ack, err := js.Publish(ctx, "ship.arrived", []byte("the ferry"))
	if err != nil {
		return err
	}
	// Without a syncer the server has synced before it acknowledged.
	if syncer := server.Syncer(); syncer != nil {
		if err := syncer.Sync(ack.Stream); err != nil {
			return err
		}
	}
	fmt.Println("on disk: message", ack.Sequence)
	return nil
}
