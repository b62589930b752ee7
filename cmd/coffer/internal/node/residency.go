package node

import (
	"context"
	"errors"
	"log/slog"
	"net/url"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/cofferdb/coffer/cmd/coffer/internal/config"
	"github.com/cofferdb/coffer/cmd/coffer/internal/residency"
	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/kms"
)

const (
	residencyFresh   = 5 * time.Second // a manifest is given again for so long
	residencyTimeout = 10 * time.Second
)

// surveyor finds out where the region's data lies. The servers are asked by one
// caller at a time: each manifest takes a request for each stream and key.
type surveyor struct {
	region *region

	mu    sync.Mutex // guards what follows
	taken time.Time
	last  residency.Manifest
}

func (s *surveyor) manifest(ctx context.Context) (residency.Manifest, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.taken.IsZero() && time.Since(s.taken) < residencyFresh {
		return s.last, nil
	}
	// One who goes away must not spoil it for those who wait.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), residencyTimeout)
	defer cancel()
	m, err := s.region.survey(ctx)
	if err != nil {
		return m, err
	}
	s.last, s.taken = m, time.Now()
	return m, nil
}

func (r *region) survey(ctx context.Context) (residency.Manifest, error) {
	m := residency.New(r.config.Journal(), r.journal.LogID(), r.options.now())
	holdings, err := r.journal.Holdings(ctx)
	if err != nil {
		return m, err
	}
	m.Streams = residency.Streams(holdings)
	m.NATS = residency.NATS{Kind: "embedded", Server: r.conn.ConnectedServerName()}
	if r.nats == nil {
		m.NATS.Kind, m.NATS.Cluster, m.NATS.TLS = "external", r.conn.ConnectedClusterName(), r.conn.TLSRequired()
	}
	for _, kek := range r.keys.Configured(ctx) {
		key := residency.Key{Provider: kek.Provider, Key: kek.Key, State: "unknown", Primary: kek.Primary}
		if kek.Description != nil {
			key.Region, key.State = kek.Description.Region, string(kek.Description.State)
		}
		m.Keys = append(m.Keys, key)
	}
	m.Endpoints = append(m.Endpoints, residency.Endpoint{Kind: "api", URL: r.url, Listen: r.listener.Addr().String(), TLS: !r.config.Plaintext})
	if r.compat != nil {
		m.Endpoints = append(m.Endpoints, residency.Endpoint{
			Kind: "compat", URL: r.compat.url, Listen: r.compat.listener.Addr().String(), TLS: !r.config.Plaintext,
		})
	}
	m.Views = residency.Views{Kind: "pebble", Directory: fileSystem(filepath.Join(regionDir(r.options.config.DataDir, r.config.ID), "views"))}
	return m, nil
}

// Found is what the servers of a region say when they are asked without its
// process between.
type Found struct {
	Streams []journal.Holding
	Keys    []residency.Key
	// Refused are keys that the configuration names and that cannot be the
	// region's: of another place or kind than it says, or not there.
	Refused []residency.Difference
	// Skipped says what could not be asked, and why.
	Skipped []string
}

// Survey asks the NATS server and the key services that a configuration names for
// a region. It changes nothing.
func Survey(ctx context.Context, cfg config.Config, region config.Region, log *slog.Logger) (Found, error) {
	var found Found
	if region.NATS.URL == "" {
		found.Skipped = append(found.Skipped, "the NATS server is inside the region's process, which alone can ask it")
	} else {
		conn, err := connectExternal(ctx, region, log)
		if err != nil {
			return found, err
		}
		defer conn.Close()
		js, err := jetstream.New(conn)
		if err != nil {
			return found, err
		}
		table := journal.RetentionTable(region.ID, cfg.PlanTable, cfg.Retention.Journal())
		if found.Streams, err = journal.ServerHoldings(ctx, js, table); err != nil {
			return found, err
		}
	}
	for _, setting := range append([]string{region.KMS}, region.KMSOthers...) {
		key, err := askKey(ctx, region, setting, log)
		if errors.Is(err, kms.ErrMismatch) || errors.Is(err, kms.ErrNotFound) {
			found.Refused = append(found.Refused, residency.Difference{
				Part: "key " + withoutSecrets(setting), Detail: err.Error(), Advice: "is it the key of this region, and its own service that answers?",
			})
			continue
		}
		if err != nil {
			found.Skipped = append(found.Skipped, "the key of "+withoutSecrets(setting)+" did not answer: "+err.Error())
			continue
		}
		found.Keys = append(found.Keys, key)
	}
	return found, nil
}

func askKey(ctx context.Context, region config.Region, setting string, log *slog.Logger) (residency.Key, error) {
	region.KMS = setting
	provider, err := openProvider(ctx, region, false, &keyAudit{}, log)
	if err != nil {
		return residency.Key{}, err
	}
	defer func() { _ = provider.Close() }()
	var d kms.Description
	if d, err = provider.Describe(ctx); err != nil {
		return residency.Key{}, err
	}
	return residency.Key{Provider: d.Provider, Key: d.Key, Region: d.Region, State: string(d.State)}, nil
}

// withoutSecrets is a setting without its query, which may name files.
func withoutSecrets(setting string) string {
	setting, _, _ = strings.Cut(setting, "?")
	if u, err := url.Parse(setting); err == nil {
		return u.Redacted()
	}
	return setting
}
