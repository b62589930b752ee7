package server

import (
	"fmt"
	"net/http"
	"reflect"
	"time"

	"github.com/cofferdb/coffer/cmd/coffer/internal/exports"
	"github.com/cofferdb/coffer/journal"
)

// exportView is how an export stands.
type exportView struct {
	ID     string         `json:"id"`
	State  exports.State  `json:"state" doc:"running, done or failed"`
	Format exports.Format `json:"format" doc:"ndjson or agora"`

	Filters exports.Filters  `json:"filters"`
	After   journal.Position `json:"after"`
	Through journal.Position `json:"through" doc:"the last position that is exported"`

	Progress float64 `json:"progress" doc:"an estimate, from 0 to 1"`
	exports.Counts

	Files    int       `json:"files"`
	Error    string    `json:"error,omitempty" doc:"why it failed, or did not get on at the last try"`
	Created  time.Time `json:"created"`
	Updated  time.Time `json:"updated"`
	Finished time.Time `json:"finished,omitzero"`
	Expires  time.Time `json:"expires" doc:"when it goes by itself"`
}

func viewExport(j exports.Job) exportView {
	return exportView{
		ID: j.ID, State: j.State, Format: j.Format, After: j.After, Through: j.Through,
		Filters:  exports.Filters{Conversation: j.Conversation, User: j.User, Types: j.Types, From: j.From, Until: j.Until},
		Progress: j.Progress(), Counts: j.Counts, Files: j.Files, Error: j.Error,
		Created: j.Created, Updated: j.Updated, Finished: j.Finished, Expires: j.Expires,
	}
}

// createExportBody is what an export is asked for with.
type createExportBody struct {
	Format exports.Format `json:"format" required:""`
	exports.Filters
}

// createExport begins an export of what the app has now.
func (s *Server) createExport(c *call) error {
	var in createExportBody
	if err := s.decode(c, &in); err != nil {
		return err
	}
	key, err := s.idempotencyKey(c.r)
	if err != nil {
		return err
	}
	if err := s.await(c); err != nil {
		return err
	}
	job, created, err := s.exports.Start(c.r.Context(), c.app, exports.Spec{
		Format: in.Format, Conversation: in.Conversation, User: in.User, Types: in.Types, From: in.From.UTC(), Until: in.Until.UTC(),
	}, key)
	if err != nil {
		return err
	}
	c.w.Header().Set("Location", "/v1/apps/"+c.app.ID.String()+"/exports/"+job.ID)
	status := http.StatusAccepted
	if !created {
		status = http.StatusOK
	}
	return s.writeJSON(c, status, viewExport(job))
}

func (s *Server) listExports(c *call) error {
	jobs, err := s.exports.List(c.r.Context(), c.app.ID)
	if err != nil {
		return err
	}
	answer := list[exportView]{Data: []exportView{}}
	for _, j := range jobs {
		answer.Data = append(answer.Data, viewExport(j))
	}
	return s.writeJSON(c, http.StatusOK, answer)
}

func (s *Server) showExport(c *call) error {
	job, err := s.exports.Job(c.r.Context(), c.app.ID, c.vars["export"])
	if err != nil {
		return err
	}
	return s.writeJSON(c, http.StatusOK, viewExport(job))
}

func (s *Server) deleteExport(c *call) error {
	if err := s.exports.Delete(c.r.Context(), c.app.ID, c.vars["export"]); err != nil {
		return err
	}
	c.w.WriteHeader(http.StatusNoContent)
	return nil
}

func (s *Server) exportManifest(c *call) error {
	job, err := s.exports.Job(c.r.Context(), c.app.ID, c.vars["export"])
	if err != nil {
		return err
	}
	manifest, err := s.exports.Manifest(c.r.Context(), job)
	if err != nil {
		return err
	}
	return s.writeJSON(c, http.StatusOK, manifest)
}

// exportFile makes a file again and streams it. One that was cut, or that the
// server could not finish, ends without the end of its transfer.
func (s *Server) exportFile(c *call) error {
	ctx := c.r.Context()
	job, err := s.exports.Job(ctx, c.app.ID, c.vars["export"])
	if err != nil {
		return err
	}
	file, err := s.exports.File(ctx, job, c.vars["file"])
	if err != nil {
		return err
	}
	release, err := s.holdStream(c, formNDJSON)
	if err != nil {
		return err
	}
	defer release()
	media := typeNDJSON
	if job.Format == exports.Agora {
		media = typeGzip
	}
	out := &fileWriter{s: s, c: c, media: media}
	if c.r.Method != http.MethodHead {
		if err := s.exports.WriteFile(ctx, out, c.app, job, file); err != nil {
			return out.broken(err)
		}
	}
	return out.end()
}

const (
	typeGzip   = "application/gzip"
	fileBuffer = 64 << 10
)

// fileWriter sends a file in pieces, each with its deadline. The answer begins
// with the first full piece, so that an error before is an ordinary problem.
type fileWriter struct {
	s     *Server
	c     *call
	media string
	buf   []byte
}

func (w *fileWriter) Write(b []byte) (int, error) {
	w.buf = append(w.buf, b...)
	if len(w.buf) < fileBuffer {
		return len(b), nil
	}
	return len(b), w.flush()
}

func (w *fileWriter) flush() error {
	if w.c.w.status == 0 {
		w.c.w.Header().Set("Content-Type", w.media)
	}
	w.s.extendDeadline(w.c)
	_, err := w.c.w.Write(w.buf)
	w.buf = w.buf[:0]
	if err != nil {
		return errCallerGone
	}
	return nil
}

// broken returns the error of a file that is not whole. When its answer has begun
// the connection, or the stream of HTTP/2, is cut: it must not look complete.
func (w *fileWriter) broken(err error) error {
	if w.c.w.status == 0 || w.c.r.Context().Err() != nil {
		return err
	}
	w.s.log.Error("a file was cut", "request_id", w.c.id, "app", w.c.app.ID.String(), "err", err)
	panic(http.ErrAbortHandler)
}

func (w *fileWriter) end() error {
	if w.c.r.Method == http.MethodHead {
		w.c.w.Header().Set("Content-Type", w.media)
		w.c.w.WriteHeader(http.StatusOK)
		return nil
	}
	if err := w.flush(); err != nil {
		return fmt.Errorf("sending a file: %w", err)
	}
	return nil
}

// exportRoutes are the rows of the route table for exports.
func (s *Server) exportRoutes() []route {
	const base = "/v1/apps/{app}/exports"
	return []route{
		{method: "GET", path: base, who: appBackend, handle: (*Server).listExports},
		{
			method: "POST", path: base, who: appBackend, bodies: []string{typeJSON}, limit: 64 << 10,
			query: []string{"min_position"}, handle: (*Server).createExport,
		},
		{method: "GET", path: base + "/{export}", who: appBackend, handle: (*Server).showExport},
		{method: "DELETE", path: base + "/{export}", who: appBackend, handle: (*Server).deleteExport},
		{method: "GET", path: base + "/{export}/manifest", who: appBackend, handle: (*Server).exportManifest},
		{method: "GET", path: base + "/{export}/files/{file}", who: appBackend, handle: (*Server).exportFile},
	}
}

// describeExports describes the routes of exports.
func (s *Server) describeExports(all map[string]description) {
	k := s.kinds
	const base = " /v1/apps/{app}/exports"
	all["GET"+base] = description{id: "exports", summary: "The app's exports", answers: []documented{ok[list[exportView]](200, "all of them, the latest first")}}
	all["POST"+base] = description{
		id: "createExport", summary: "Begin an export", body: reflect.TypeFor[createExportBody](),
		text: "Of what the app has now, narrowed by the filters. It is made in the background; its files are made again when they are fetched, so " +
			"nothing of it is stored, and what is recalled, erased or expired meanwhile is not in them.",
		headers: []parameter{{
			name: "Idempotency-Key", schema: text("^[A-Za-z0-9_@:+=~-]{1,120}$"),
			about: "a second request with it gets the export of the first",
		}},
		answers: []documented{
			ok[exportView](200, "it was asked for before with this key"),
			ok[exportView](202, "it is durable; `Location` says how it goes"),
		},
		problems: []kind{k.viewBehind, k.conflict, k.exportsFull, k.storeFull, k.payloadTooLarge},
	}
	all["GET"+base+"/{export}"] = description{id: "export", summary: "How an export stands", answers: []documented{ok[exportView](200, "the export")}}
	all["DELETE"+base+"/{export}"] = description{id: "deleteExport", summary: "End and remove an export", answers: []documented{{status: 204, about: "it is gone"}}}
	all["GET"+base+"/{export}/manifest"] = description{
		id: "exportManifest", summary: "What an export holds: its files, counts and digests",
		answers:  []documented{ok[exports.Manifest](200, "see docs/format/export.md")},
		problems: []kind{k.exportUnfinished},
	}
	all["GET"+base+"/{export}/files/{file}"] = description{
		id: "exportFile", summary: "A file of an export",
		text: "It is made while it is sent, so its size is not known before. One that is cut ends without the end of its transfer (the last chunk, or END_STREAM).",
		answers: []documented{{status: 200, about: "the file", streams: map[string]string{
			typeNDJSON: "an event on each line", typeGzip: "the lines of one UTC hour, in the form of Agora Chat's history export",
		}}},
		problems: []kind{k.exportUnfinished, k.retentionExpired, k.erased, k.viewBehind},
	}
}
