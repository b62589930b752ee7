package client

import (
	"context"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/cofferdb/coffer/journal"
)

// ErrDigest means that content is not what its digest says: what is here already
// belongs to something else, or the attachment was stored anew meanwhile. Throw
// away what was written and fetch the whole.
var ErrDigest = errors.New("the content is not what its digest says")

// Attachment is what is known of an attachment.
type Attachment struct {
	ID        string            `json:"id"`
	Size      int64             `json:"size,string"` // in bytes
	SHA256    [sha256.Size]byte `json:"sha256"`      // of the content
	MediaType string            `json:"media_type"`
	Stored    time.Time         `json:"stored"`

	// The rest is told by PutAttachment only.

	Conversation string    `json:"conversation,omitempty"`
	Sender       string    `json:"sender,omitempty"`
	Expires      time.Time `json:"expires,omitzero"`
}

// AttachmentSpec says what an attachment is to be. Only ID is needed.
type AttachmentSpec struct {
	ID string
	// MediaType is kept and given back, not believed; application/octet-stream
	// when empty.
	MediaType    string
	Conversation string
	// ConversationType is that of the conversation; 0 leaves it to the server:
	// direct for an id with a comma, group for others.
	ConversationType journal.ConversationType
	// Sender is the user whose erasure ends the attachment. With a user's token
	// it is that user.
	Sender string
	// SHA256 of the content is computed when it is zero.
	SHA256 [sha256.Size]byte
}

// PutAttachment stores the first size bytes of content, streamed, with a digest
// that the server compares. It is repeated while the server is away: what was
// stored already under the id is taken as success when it is the same, and is
// otherwise [ErrConflict]. Content may still be read for a moment afterwards when
// the server has refused it.
func (c *Client) PutAttachment(ctx context.Context, spec AttachmentSpec, content io.ReaderAt, size int64) (a Attachment, err error) {
	if spec.SHA256 == [sha256.Size]byte{} {
		sum := sha256.New()
		if _, err := io.CopyN(sum, io.NewSectionReader(content, 0, size), size); err != nil {
			return a, fmt.Errorf("reading the content: %w", err)
		}
		sum.Sum(spec.SHA256[:0])
	}
	r := request{
		method: http.MethodPut, path: c.appPath("attachments", spec.ID), query: url.Values{}, accept: "application/json",
		mime:   spec.MediaType,
		header: http.Header{"Content-Digest": {"sha-256=:" + base64.StdEncoding.EncodeToString(spec.SHA256[:]) + ":"}},
	}
	if r.mime == "" {
		r.mime = "application/octet-stream"
	}
	if spec.Conversation != "" {
		r.query.Set("conversation", spec.Conversation)
	}
	if spec.ConversationType != 0 {
		r.query.Set("conversationtype", spec.ConversationType.String())
	}
	if spec.Sender != "" {
		r.query.Set("sender", spec.Sender)
	}
	p := patience{limit: c.retryFor}
	for {
		a, err = c.upload(ctx, r, content, size)
		if err == nil {
			return a, nil
		}
		if err := p.wait(ctx, c.log, err); err != nil {
			return a, err
		}
	}
}

// upload makes one attempt, which may take as long as it gets on.
func (c *Client) upload(ctx context.Context, r request, content io.ReaderAt, size int64) (a Attachment, err error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	quiet := time.AfterFunc(quietLimit, func() {
		cancel(&connectionError{err: fmt.Errorf("nothing was taken for %s", quietLimit)})
	})
	defer quiet.Stop()
	// Each attempt has a reader of its own: the transport of one that failed may
	// still be reading.
	out := &outgoing{r: io.NewSectionReader(content, 0, size), left: size, quiet: quiet}
	r.stream, r.size = out, size
	resp, err := c.send(ctx, r)
	if failed := out.failed(); failed != nil {
		if err == nil {
			drain(resp)
		}
		return a, fmt.Errorf("reading the content: %w", failed)
	}
	if err != nil {
		return a, err
	}
	defer drain(resp)
	return a, decode(resp, &a)
}

// outgoing is content on its way: it moves the timer on, and remembers that
// reading failed, and not sending.
type outgoing struct {
	r     io.Reader
	quiet *time.Timer
	left  int64

	mu  sync.Mutex // guards err
	err error
}

func (o *outgoing) Read(p []byte) (int, error) {
	o.quiet.Reset(quietLimit)
	n, err := o.r.Read(p)
	o.left -= int64(n)
	if errors.Is(err, io.EOF) && o.left > 0 {
		err = io.ErrUnexpectedEOF
	}
	if err != nil && !errors.Is(err, io.EOF) {
		o.mu.Lock()
		o.err = err
		o.mu.Unlock()
	}
	return n, err
}

func (o *outgoing) failed() error {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.err
}

// Attachment returns what is known of an attachment, without its content.
func (c *Client) Attachment(ctx context.Context, id string) (a Attachment, err error) {
	err = c.call(ctx, request{method: http.MethodHead, path: c.appPath("attachments", id)}, func(resp *http.Response) error {
		a = Attachment{ID: id, Size: resp.ContentLength, MediaType: resp.Header.Get("Content-Type")}
		var known bool
		if a.SHA256, known = reprDigest(resp.Header); !known || a.Size < 0 {
			return fmt.Errorf("%w: the answer has no digest or no length", ErrProtocol)
		}
		a.Stored, err = http.ParseTime(resp.Header.Get("Last-Modified"))
		if err != nil {
			return fmt.Errorf("%w: the answer has no time", ErrProtocol)
		}
		return nil
	})
	return a, err
}

// AttachmentContent writes to w the content of an attachment, which
// [Client.Attachment] has told of. What is in have, the beginning of the content
// as an earlier call wrote it, is read and not fetched again; nil when nothing is
// there. A connection that is cut is taken up after what has arrived. At the end
// the whole is compared with its digest: with [ErrDigest] it is not the attachment.
func (c *Client) AttachmentContent(ctx context.Context, a Attachment, have io.Reader, w io.Writer) error {
	sum, offset := sha256.New(), int64(0)
	if have != nil {
		n, err := io.Copy(sum, have)
		if err != nil {
			return fmt.Errorf("reading what is here: %w", err)
		}
		offset = n
	}
	p := patience{limit: c.retryFor}
	for offset < a.Size {
		n, err := c.attachmentFrom(ctx, a, offset, io.MultiWriter(w, sum))
		offset += n
		if err == nil && offset < a.Size {
			err = &connectionError{err: fmt.Errorf("the content was cut: %w", io.ErrUnexpectedEOF)}
		}
		if err == nil {
			break
		}
		if n > 0 {
			p.reset()
		}
		if err := p.wait(ctx, c.log, err); err != nil {
			return err
		}
	}
	if offset != a.Size || [sha256.Size]byte(sum.Sum(nil)) != a.SHA256 {
		return ErrDigest
	}
	return nil
}

// attachmentFrom fetches what there is from an offset on, and returns how much
// has been written.
func (c *Client) attachmentFrom(ctx context.Context, a Attachment, offset int64, w io.Writer) (int64, error) {
	r := request{
		method: http.MethodGet, path: c.appPath("attachments", a.ID),
		header: http.Header{"Accept-Encoding": {"identity"}}, // the transport's own would count other bytes
	}
	if offset > 0 {
		r.header.Set("Range", "bytes="+strconv.FormatInt(offset, 10)+"-")
	}
	return c.download(ctx, r, func(resp *http.Response) (io.Writer, error) {
		if digest, known := reprDigest(resp.Header); !known || digest != a.SHA256 {
			return nil, ErrDigest
		}
		begins := strings.HasPrefix(resp.Header.Get("Content-Range"), "bytes "+strconv.FormatInt(offset, 10)+"-")
		if offset > 0 && (resp.StatusCode != http.StatusPartialContent || !begins) {
			return nil, fmt.Errorf("%w: the range is not what was asked for", ErrProtocol)
		}
		return w, nil
	})
}

// reprDigest reads the SHA-256 of a Repr-Digest (RFC 9530).
func reprDigest(h http.Header) (digest [sha256.Size]byte, ok bool) {
	for member := range strings.SplitSeq(strings.Join(h.Values("Repr-Digest"), ","), ",") {
		text, found := strings.CutPrefix(strings.TrimSpace(member), "sha-256=:")
		text, closed := strings.CutSuffix(text, ":")
		b, err := base64.StdEncoding.DecodeString(text)
		if found && closed && err == nil && len(b) == sha256.Size {
			return [sha256.Size]byte(b), true
		}
	}
	return digest, false
}

// DeleteAttachment deletes an attachment. One that is not there is ErrNotFound,
// also when an attempt that was cut has deleted it.
func (c *Client) DeleteAttachment(ctx context.Context, id string) error {
	r := request{method: http.MethodDelete, path: c.appPath("attachments", id)}
	return c.call(ctx, r, func(*http.Response) error { return nil })
}
