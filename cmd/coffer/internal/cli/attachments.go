package cli

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"mime"
	"os"
	"path/filepath"
	"sync"
	"text/tabwriter"
	"time"

	"github.com/schollz/progressbar/v3"
	"golang.org/x/term"

	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/journal/client"
)

type attachCmds struct {
	Put    attachPutCmd    `cmd:"" help:"Store files."`
	Get    attachGetCmd    `cmd:"" help:"Fetch an attachment's content."`
	Show   attachShowCmd   `cmd:"" help:"Show what is known of an attachment."`
	Delete attachDeleteCmd `cmd:"" help:"Delete an attachment."`
}

type attachPutCmd struct {
	Files            []string `arg:"" name:"file" help:"What to store."`
	ID               string   `name:"id" placeholder:"ID" help:"The attachment's id, for one file; a new one is made otherwise."`
	MediaType        string   `placeholder:"TYPE" help:"Its media type; by itself that of the file's extension."`
	Conversation     string   `placeholder:"ID" help:"The conversation that it belongs to."`
	ConversationType string   `placeholder:"TYPE" help:"Of which kind that is: direct, group or room. By itself direct for an id with a comma, group for others."`
	Sender           string   `placeholder:"ID" help:"The user who sends it, and whose erasure ends it."`
	JSON             bool     `name:"json" help:"Print each attachment as a line of JSON."`
	appServer
}

func (*attachPutCmd) Help() string {
	return `Prints the id, size and SHA-256 of each attachment, in a line. An attachment is never changed: the same file again
under its id is fine, another one is refused. It stops at the first file that cannot be stored. Examples:

    coffer attachments put --conversation room-1 --sender ann quay.jpg ferry.jpg
    coffer attachments put --id pic-1 quay.jpg`
}

func (c *attachPutCmd) Run(r *runner) error {
	if c.ID != "" && len(c.Files) > 1 {
		return &failure{ExitUsage, errors.New("--id is for one file")}
	}
	spec := client.AttachmentSpec{Conversation: c.Conversation, Sender: c.Sender}
	if c.ConversationType != "" {
		var err error
		if spec.ConversationType, err = journal.ParseConversationType(c.ConversationType); err != nil || c.Conversation == "" {
			return &failure{ExitUsage, errors.New("--conversation-type is direct, group or room, and of a --conversation")}
		}
	}
	cl, err := c.client(r)
	if err != nil {
		return err
	}
	defer cl.Close()
	for _, name := range c.Files {
		spec.ID, spec.MediaType = c.ID, c.MediaType
		if spec.ID == "" {
			spec.ID = journal.NewEventID(time.Now())
		}
		if spec.MediaType == "" {
			spec.MediaType = mime.TypeByExtension(filepath.Ext(name))
		}
		a, err := putFile(r, cl, spec, name)
		if err != nil {
			return fmt.Errorf("storing %s: %w", name, err)
		}
		if c.JSON {
			err = printJSON(r, a)
		} else {
			_, err = fmt.Fprintf(r.Stdout, "%s  %d  %x  %s\n", a.ID, a.Size, a.SHA256, printable(name, 0))
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// putFile reads the file twice: for its digest, then for the server.
func putFile(r *runner, cl *client.Client, spec client.AttachmentSpec, name string) (client.Attachment, error) {
	f, err := os.Open(name)
	if err != nil {
		return client.Attachment{}, err
	}
	defer func() { _ = f.Close() }()
	info, err := f.Stat()
	if err != nil {
		return client.Attachment{}, err
	}
	if !info.Mode().IsRegular() {
		return client.Attachment{}, errors.New("it is no regular file")
	}
	sum := sha256.New()
	size, err := io.Copy(sum, f)
	if err != nil {
		return client.Attachment{}, err
	}
	sum.Sum(spec.SHA256[:0])
	shown := newTransfer(r, "storing", size)
	defer shown.finish()
	return cl.PutAttachment(r.interrupt, spec, &shownFile{f, shown}, size)
}

type attachGetCmd struct {
	ID     string `arg:"" help:"The attachment's id."`
	Output string `short:"o" placeholder:"FILE" help:"Where the content goes, instead of standard output."`
	appServer
}

func (*attachGetCmd) Help() string {
	return `The content is compared with its digest at the end; on standard output it has been written by then, and the exit code
says whether it is good. With -o it is collected in FILE.part, readable by its owner only, and gets its name when it is
whole; the same command goes on after an interrupt, a kill or a cut connection. A FILE that is there is left alone.

    coffer attachments get pic-1 -o quay.jpg`
}

func (c *attachGetCmd) Run(r *runner) error {
	if c.Output != "" {
		if _, err := os.Lstat(c.Output); err == nil {
			return fmt.Errorf("%s is there already; take another name", c.Output)
		}
	}
	cl, err := c.client(r)
	if err != nil {
		return err
	}
	defer cl.Close()
	a, err := cl.Attachment(r.interrupt, c.ID)
	if err != nil {
		return fmt.Errorf("attachment %s: %w", printable(c.ID, 0), err)
	}
	if c.Output == "" {
		return cl.AttachmentContent(r.interrupt, a, nil, r.Stdout)
	}
	err = c.fetch(r, cl, a)
	switch {
	case err == nil, errors.Is(err, client.ErrDigest):
		return err
	case r.interrupt.Err() != nil:
		r.say("coffer: interrupted; the same command goes on")
		return &failure{code: ExitInterrupted}
	}
	return fmt.Errorf("the attachment stopped: %w; the same command goes on", err)
}

// fetch goes on with the part that is there, and begins anew when that is of
// something else.
func (c *attachGetCmd) fetch(r *runner, cl *client.Client, a client.Attachment) error {
	part, err := os.OpenFile(c.Output+".part", os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	defer func() { _ = part.Close() }()
	info, err := part.Stat()
	if err != nil {
		return err
	}
	shown := newTransfer(r, "fetching", a.Size)
	defer shown.finish()
	// Reading what is there leaves the file where the rest belongs.
	err = cl.AttachmentContent(r.interrupt, a, part, &shownPart{part, shown, info.Size()})
	if errors.Is(err, client.ErrDigest) {
		if info.Size() == 0 {
			return errors.Join(err, os.Remove(part.Name()))
		}
		if err := part.Truncate(0); err != nil {
			return err
		}
		if _, err := part.Seek(0, io.SeekStart); err != nil {
			return err
		}
		r.say("%s was of something else: fetching the whole", part.Name())
		err = cl.AttachmentContent(r.interrupt, a, nil, &shownPart{part, shown, 0})
	}
	if err != nil {
		return err
	}
	if err := part.Sync(); err != nil {
		return err
	}
	return os.Rename(part.Name(), c.Output)
}

type attachShowCmd struct {
	ID   string `arg:"" help:"The attachment's id."`
	JSON bool   `name:"json" help:"Print JSON."`
	appServer
}

func (c *attachShowCmd) Run(r *runner) error {
	cl, err := c.client(r)
	if err != nil {
		return err
	}
	defer cl.Close()
	a, err := cl.Attachment(r.interrupt, c.ID)
	if err != nil {
		return fmt.Errorf("attachment %s: %w", printable(c.ID, 0), err)
	}
	if c.JSON {
		return printJSON(r, a)
	}
	w := tabwriter.NewWriter(r.Stdout, 0, 8, 2, ' ', 0)
	_, _ = fmt.Fprintf(w, "id\t%s\nsize\t%d\nsha256\t%x\nmedia type\t%s\nstored\t%s\n",
		printable(a.ID, 0), a.Size, a.SHA256, printable(a.MediaType, 0), a.Stored.Format(time.RFC3339))
	return w.Flush()
}

type attachDeleteCmd struct {
	ID string `arg:"" help:"The attachment's id."`
	appServer
}

func (*attachDeleteCmd) Help() string {
	return `It needs the app's token; a user's does not delete. The event that told of the attachment stays.`
}

func (c *attachDeleteCmd) Run(r *runner) error {
	cl, err := c.client(r)
	if err != nil {
		return err
	}
	defer cl.Close()
	return cl.DeleteAttachment(r.interrupt, c.ID)
}

// transfer shows how far a file is: a bar on a terminal, otherwise a line now and
// then.
type transfer struct {
	r     *runner
	what  string
	total int64

	mu   sync.Mutex // guards what follows
	bar  *progressbar.ProgressBar
	last time.Time
}

func newTransfer(r *runner, what string, total int64) *transfer {
	t := &transfer{r: r, what: what, total: total, last: time.Now()}
	if f, ok := r.Stderr.(*os.File); ok && term.IsTerminal(int(f.Fd())) {
		t.bar = progressbar.NewOptions64(max(1, total),
			progressbar.OptionSetWriter(r.Stderr), progressbar.OptionThrottle(drawInterval), progressbar.OptionFullWidth(),
			progressbar.OptionShowBytes(true), progressbar.OptionSetPredictTime(true), progressbar.OptionClearOnFinish(),
			progressbar.OptionSetDescription(what))
	}
	return t
}

func (t *transfer) show(done int64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.bar != nil {
		_ = t.bar.Set64(min(done, max(0, t.total-1))) // finish removes it
		return
	}
	if now := time.Now(); now.Sub(t.last) >= quietInterval {
		t.last = now
		t.r.say("%s: %d of %d bytes", t.what, done, t.total)
	}
}

func (t *transfer) finish() {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.bar != nil {
		_ = t.bar.Clear()
	}
}

// shownFile shows how far it has been read.
type shownFile struct {
	f     io.ReaderAt
	shown *transfer
}

func (s *shownFile) ReadAt(p []byte, offset int64) (int, error) {
	n, err := s.f.ReadAt(p, offset)
	s.shown.show(offset + int64(n))
	return n, err
}

// shownPart shows how far it has been written.
type shownPart struct {
	w     io.Writer
	shown *transfer
	done  int64
}

func (s *shownPart) Write(p []byte) (int, error) {
	n, err := s.w.Write(p)
	s.done += int64(n)
	s.shown.show(s.done)
	return n, err
}
