package server

import (
	"errors"
	"maps"
	"slices"
	"time"

	"github.com/cofferdb/coffer/cmd/coffer/internal/deliver"
	"github.com/cofferdb/coffer/cmd/coffer/internal/endpoints"
)

const (
	compatDate  = "200601021504"
	storageSpan = 10 * time.Minute // of a key
)

// storedCallbacks is a key of failed callbacks: those whose events have arrived
// within ten minutes.
type storedCallbacks struct {
	Date  string `json:"date"`
	Size  int    `json:"size"`
	Retry int    `json:"retry"`
}

// storageInfo lists the keys that have failed callbacks.
func (p *Compat) storageInfo(s *Server, c *call) error {
	started := s.now()
	found, err := s.callbacks.Endpoints.Endpoints(c.r.Context(), c.app.ID)
	if err != nil {
		return err
	}
	sizes := make(map[string]int)
	for i := range found {
		err := s.callbacks.Failed(c.r.Context(), &found[i], func(arrived time.Time) {
			sizes[arrived.Truncate(storageSpan).Format(compatDate)]++
		})
		if err != nil {
			return err
		}
	}
	keys := []storedCallbacks{}
	for _, date := range slices.Sorted(maps.Keys(sizes)) {
		keys = append(keys, storedCallbacks{Date: date, Size: sizes[date]})
	}
	return p.write(c, keys, started)
}

type storageRetryBody struct {
	Date      string `json:"date"`
	Retry     int    `json:"retry"`
	TargetURL string `json:"targetUrl"`
}

// storageRetry sends the failed callbacks of a key again, to the endpoints that
// they are for. A targetUrl chooses one of those; it names nothing new, for a
// server that posts to whatever address it is given can be used against others.
func (p *Compat) storageRetry(s *Server, c *call) error {
	started := s.now()
	var in storageRetryBody
	if err := p.read(c, &in); err != nil {
		return err
	}
	from, err := time.Parse(compatDate, in.Date)
	if err != nil || from.Format(compatDate) != in.Date || !from.Truncate(storageSpan).Equal(from) {
		return s.invalidBody("/date", "it is the beginning of ten minutes in UTC, yyyyMMddHHmm")
	}
	if in.Retry != 0 {
		return s.kinds.notFound.problem("there is no such key: what fails again is under the time of its retry, and retry 0")
	}
	found, err := s.callbacks.Endpoints.Endpoints(c.r.Context(), c.app.ID)
	if err != nil {
		return err
	}
	if in.TargetURL != "" {
		found = slices.DeleteFunc(found, func(e endpoints.Endpoint) bool { return e.URL != in.TargetURL })
		if len(found) == 0 {
			return s.kinds.urlForbidden.problem("targetUrl is not the URL of one of the app's endpoints")
		}
	}
	sent := 0
	for i := range found {
		if found[i].State != endpoints.Enabled {
			continue
		}
		n, err := s.callbacks.RetryFailed(c.r.Context(), &found[i], from, from.Add(storageSpan))
		if err != nil && !errors.Is(err, deliver.ErrNoDelivery) {
			return err
		}
		sent += n
	}
	if sent == 0 {
		return s.kinds.notFound.problem("no endpoint that is enabled has failed callbacks of this time")
	}
	return p.write(c, map[string]any{"status": "success", "size": sent}, started)
}
