package server

import (
	"cmp"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/dunglas/httpsfv"
	"github.com/go-json-experiment/json"

	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/journal/attachments"
	"github.com/cofferdb/coffer/kms"
)

// typeAny stands for any media type of a body.
const typeAny = "*/*"

// attachmentPrefix makes the id of the event that tells of an attachment.
const attachmentPrefix = "attachment:"

// attachmentView is what is known of an attachment.
type attachmentView struct {
	ID           string `json:"id"`
	Size         string `json:"size"                   doc:"in bytes, decimal"`
	SHA256       string `json:"sha256"                 doc:"of the content, base64"`
	MediaType    string `json:"media_type"`
	Conversation string `json:"conversation,omitempty"`
	Sender       string `json:"sender,omitempty"`
	Stored       string `json:"stored"`
	Expires      string `json:"expires"`
}

func (s *Server) attachmentView(info attachments.Info) attachmentView {
	return attachmentView{
		ID: info.ID, Size: strconv.FormatInt(info.Size, 10), SHA256: base64.StdEncoding.EncodeToString(info.Digest[:]),
		MediaType: info.Media, Conversation: info.Conversation, Sender: info.Sender,
		Stored: formatTime(info.Stored), Expires: formatTime(info.Stored.Add(s.journal.Retention().Attachments)),
	}
}

// putAttachment stores the body as it arrives, then the event that tells of it.
// Sent again, it does what is still to be done.
func (s *Server) putAttachment(c *call) error {
	upload, err := s.uploadOf(c)
	if err != nil {
		return err
	}
	if c.r.ContentLength > s.attached.Limit() {
		return attachments.ErrTooLarge
	}
	release, err := s.holdStream(c, formNDJSON)
	if err != nil {
		return err
	}
	defer release()
	kind, err := s.conversationTypeOf(c, upload.Conversation)
	if err != nil {
		return err
	}
	if err := s.maySendTo(c, upload.Conversation); err != nil {
		return err
	}
	info, created, err := s.attached.Put(c.r.Context(), c.app.ID, upload, &steady{s: s, c: c})
	if err != nil {
		return s.uploadError(err)
	}
	if err := s.tellOfAttachment(c, info, kind); err != nil {
		return err
	}
	if created {
		return s.writeJSON(c, http.StatusCreated, s.attachmentView(info))
	}
	return s.writeJSON(c, http.StatusOK, s.attachmentView(info))
}

// conversationTypeOf is the kind of conversation of the event: what the caller
// says, or what the id looks like.
func (s *Server) conversationTypeOf(c *call, conversation string) (journal.ConversationType, error) {
	text := c.query.Get("conversationtype")
	switch {
	case text != "":
		kind, err := journal.ParseConversationType(text)
		if err != nil || conversation == "" {
			return 0, s.invalidParameter("conversationtype", "it is direct, group or room, and of a conversation")
		}
		return kind, nil
	case conversation == "":
		return 0, nil
	case strings.Contains(conversation, ","):
		return journal.Direct, nil
	}
	return journal.Group, nil
}

func (s *Server) tellOfAttachment(c *call, info attachments.Info, kind journal.ConversationType) error {
	data, err := json.Marshal(map[string]any{
		"attachment": info.ID, "size": info.Size, "sha256": base64.StdEncoding.EncodeToString(info.Digest[:]), "media_type": info.Media,
	}, json.Deterministic(true))
	if err != nil {
		return fmt.Errorf("encoding an event: %w", err)
	}
	results, err := s.journal.Append(c.r.Context(), c.app.ID, journal.Event{
		ID: attachmentPrefix + info.ID, Type: journal.AttachmentStored, Time: info.Stored,
		Conversation: info.Conversation, ConversationType: kind, Sender: info.Sender, Data: data,
	})
	if err != nil {
		return err
	}
	return results[0].Err
}

// uploadOf reads everything about an upload but its content.
func (s *Server) uploadOf(c *call) (attachments.Upload, error) {
	u := attachments.Upload{ID: c.vars["attachment"], Conversation: c.query.Get("conversation"), Sender: c.query.Get("sender")}
	if err := journal.CheckEventID(attachmentPrefix + u.ID); err != nil || u.ID == "" {
		return u, s.invalidParameter("attachment", "the id is not valid; an attachment's id is an event's id of at most 117 bytes")
	}
	if u.Conversation != "" {
		if err := journal.CheckConversationID(u.Conversation); err != nil {
			return u, s.invalidParameter("conversation", err.Error())
		}
	}
	if u.Sender != "" {
		if err := journal.CheckUserID(u.Sender); err != nil {
			return u, s.invalidParameter("sender", err.Error())
		}
	}
	if c.caller.kind == endUser {
		if u.Sender != "" && u.Sender != c.caller.user {
			return u, s.kinds.privilegeMissing.problem("a user's token sends as its own user only")
		}
		u.Sender = c.caller.user
	}
	var err error
	if u.Media, err = s.mediaOf(c.r); err != nil {
		return u, err
	}
	u.Digest, err = s.digestOf(c.r)
	return u, err
}

// mediaOf returns the Content-Type, which is kept and given back, not believed.
func (s *Server) mediaOf(r *http.Request) (string, error) {
	values := r.Header.Values("Content-Type")
	if len(values) != 1 || len(values[0]) > 256 {
		return "", s.invalidHeader(s.kinds.unsupportedType, "Content-Type", "one Content-Type of at most 256 bytes is needed")
	}
	media, parameters, err := mime.ParseMediaType(values[0])
	if err != nil || !strings.Contains(media, "/") {
		return "", s.invalidHeader(s.kinds.unsupportedType, "Content-Type", "the Content-Type cannot be read")
	}
	if r.Header.Get("Content-Encoding") != "" {
		return "", s.invalidHeader(s.kinds.unsupportedType, "Content-Encoding", "an attachment is kept as it is; it has no Content-Encoding")
	}
	return mime.FormatMediaType(media, parameters), nil
}

// digestOf reads the SHA-256 of a Content-Digest (RFC 9530); others are not
// looked at, as it says.
func (s *Server) digestOf(r *http.Request) ([]byte, error) {
	values := r.Header.Values("Content-Digest")
	if len(values) == 0 {
		return nil, nil
	}
	wrong := func() error {
		return s.invalidHeader(s.kinds.invalidRequest, "Content-Digest", "the form is sha-256=:BASE64: (RFC 9530)")
	}
	dictionary, err := httpsfv.UnmarshalDictionary(values)
	if err != nil {
		return nil, wrong()
	}
	member, ok := dictionary.Get("sha-256")
	if !ok {
		return nil, nil
	}
	item, ok := member.(httpsfv.Item)
	if !ok {
		return nil, wrong()
	}
	digest, ok := item.Value.([]byte)
	if !ok || len(digest) != sha256.Size {
		return nil, wrong()
	}
	return digest, nil
}

func (s *Server) uploadError(err error) error {
	switch {
	case errors.Is(err, attachments.ErrTooLarge):
		return s.kinds.payloadTooLarge.problem(fmt.Sprintf("the attachment is over %d bytes", s.attached.Limit()))
	case errors.Is(err, attachments.ErrDigest):
		return s.invalidHeader(s.kinds.invalidRequest, "Content-Digest", "the content that arrived has another digest; nothing was stored")
	case errors.Is(err, os.ErrDeadlineExceeded), errors.Is(err, io.ErrUnexpectedEOF):
		return s.bodyError(err, s.attached.Limit())
	}
	return err
}

// steady reads a body that may take long, as long as it goes on arriving.
type steady struct {
	s    *Server
	c    *call
	left int // bytes until the deadline moves on
}

const steadyStep = 64 << 10

func (r *steady) Read(p []byte) (int, error) {
	if r.left <= 0 {
		r.s.bodyDeadline(r.c)
		r.left = steadyStep
	}
	n, err := r.c.r.Body.Read(p)
	r.left -= n
	return n, err
}

// getAttachment sends an attachment or a range of it (RFC 9110, section 14).
func (s *Server) getAttachment(c *call) error {
	id := c.vars["attachment"]
	if err := journal.CheckEventID(id); err != nil {
		return s.invalidParameter("attachment", err.Error())
	}
	content, err := s.attached.Open(c.r.Context(), c.app.ID, id)
	if err != nil {
		return err
	}
	defer func() { _ = content.Close() }()
	if may, err := s.mayRead(c, content.Info); err != nil || !may {
		return cmp.Or(err, attachments.ErrNotFound)
	}
	if err := s.checkRange(c, content.Size); err != nil {
		return err
	}
	release, err := s.holdStream(c, formNDJSON)
	if err != nil {
		return err
	}
	defer release()
	digest := "sha-256=:" + base64.StdEncoding.EncodeToString(content.Digest[:]) + ":"
	h := c.w.Header()
	h.Set("Content-Type", content.Media)
	h.Set("Repr-Digest", digest)
	h.Set("ETag", `"`+hex.EncodeToString(content.Digest[:])+`"`)
	// Whatever it says it is, no browser shows it as a page of this origin.
	h.Set("Content-Disposition", "attachment")
	h.Set("Content-Security-Policy", "sandbox")
	http.ServeContent(c.w, c.r, "", content.Stored, &paced{ReadSeeker: content, s: s, c: c})
	return nil
}

// mayRead reports whether the caller may read an attachment: a user those that
// it has sent, and those of the conversations that it takes part in.
func (s *Server) mayRead(c *call, info attachments.Info) (bool, error) {
	if c.caller.kind != endUser || info.Sender == c.caller.user {
		return true, nil
	}
	if info.Conversation == "" {
		return false, nil
	}
	conversation, err := s.journal.Tag(c.r.Context(), c.app.ID, kms.KindConversation, info.Conversation)
	if err != nil {
		return false, err
	}
	return s.takesPart(c, conversation, c.caller.user)
}

// maySendTo returns nil if the caller may put an attachment into the conversation.
func (s *Server) maySendTo(c *call, conversation string) error {
	if c.caller.kind != endUser || conversation == "" {
		return nil
	}
	tag, err := s.journal.Tag(c.r.Context(), c.app.ID, kms.KindConversation, conversation)
	if err != nil {
		return err
	}
	return s.visible(c, tag)
}

// checkRange refuses a range beyond the end, and drops what is not one range:
// a server may answer such requests in full.
func (s *Server) checkRange(c *call, size int64) error {
	unit, spec, _ := strings.Cut(c.r.Header.Get("Range"), "=")
	first, _, one := strings.Cut(spec, "-")
	if unit != "bytes" || !one || strings.Contains(spec, ",") {
		c.r.Header.Del("Range")
		return nil
	}
	begin, err := strconv.ParseInt(strings.TrimSpace(first), 10, 64)
	if first == "" || err == nil && begin < size {
		return nil
	}
	c.w.Header().Set("Content-Range", "bytes */"+strconv.FormatInt(size, 10))
	return s.kinds.rangeUnfit.problem("the attachment has " + strconv.FormatInt(size, 10) + " bytes")
}

// paced gives each part of an answer its time.
type paced struct {
	io.ReadSeeker

	s *Server
	c *call
}

func (p *paced) Read(b []byte) (int, error) {
	p.s.extendDeadline(p.c)
	return p.ReadSeeker.Read(b)
}

func (s *Server) deleteAttachment(c *call) error {
	if err := journal.CheckEventID(c.vars["attachment"]); err != nil {
		return s.invalidParameter("attachment", err.Error())
	}
	if err := s.attached.Delete(c.r.Context(), c.app.ID, c.vars["attachment"]); err != nil {
		return err
	}
	c.w.WriteHeader(http.StatusNoContent)
	return nil
}

func formatTime(t time.Time) string { return t.UTC().Format(timeLayout) }
