package attachments_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/journal/attachments"
)

// A caller answers with the content, or says why there is none.
func ExampleStore_Open() {
	send := func(ctx context.Context, store *attachments.Store, app journal.AppID, id string, to io.Writer) error {
		content, err := store.Open(ctx, app, id)
		if errors.Is(err, attachments.ErrNotFound) {
			return fmt.Errorf("no attachment %s, or none any more", id)
		}
		if err != nil {
			return err
		}
		defer func() { _ = content.Close() }()
		_, err = io.Copy(to, content)
		return err
	}
	_ = send
	fmt.Fprintln(os.Stdout, attachments.ChunkSize, "bytes are sealed together")
	// Output: 65536 bytes are sealed together
}
