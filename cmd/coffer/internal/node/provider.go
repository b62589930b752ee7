package node

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync/atomic"

	"github.com/cofferdb/coffer/cmd/coffer/internal/config"
	"github.com/cofferdb/coffer/cmd/coffer/internal/monitor"
	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/kms"
	"github.com/cofferdb/coffer/kms/awskms"
	"github.com/cofferdb/coffer/kms/local"
	"github.com/cofferdb/coffer/kms/vault"
)

// ErrProvider means that a region's kms setting names no provider this binary
// has. Write local:PATH, vault+https://HOST/MOUNT/KEY?… or awskms:///KEY?….
var ErrProvider = errors.New("unknown key provider")

// openProvider opens the provider that the setting names. A new key file is
// made only for a region that has no data: for one that has, a missing file is
// a loss that must be said.
func openProvider(ctx context.Context, r config.Region, fresh bool, a *keyAudit, log *slog.Logger) (kms.Provider, error) {
	scheme, rest, _ := strings.Cut(r.KMS, ":")
	var p kms.Provider
	var err error
	switch scheme {
	case "local":
		p, err = local.Open(ctx, local.Options{Path: rest, Create: fresh, Region: r.ID, Observe: a.observe})
	case "vault+https", "vault+http":
		var o vault.Options
		if o, err = vault.ParseURL(r.KMS); err == nil {
			o.Log, o.Observe = log, a.observe
			p, err = vault.New(o)
		}
	case "awskms":
		var o awskms.Options
		if o, err = awskms.ParseURL(r.KMS); err == nil {
			o.Log, o.Observe = log, a.observe
			p, err = awskms.New(ctx, o)
		}
	default:
		return nil, fmt.Errorf("%w: region %s: the setting begins with %q", ErrProvider, r.ID, scheme)
	}
	if err != nil {
		return nil, fmt.Errorf("opening the key provider: %w", err)
	}
	return p, nil
}

// keyAudit records the calls to a region's key provider in the region's audit
// log, from when the journal is open. A description that went well is left out,
// and so are a probe's calls: readiness asks for them often, and they are of no
// app's key.
type keyAudit struct {
	journal atomic.Pointer[journal.Journal]
	metrics *monitor.Metrics
}

func (a *keyAudit) observe(ctx context.Context, c kms.Call) {
	said := "ok"
	if c.Err != nil {
		said = outcome(c.Err)
	}
	a.metrics.KMS(c, said)
	j := a.journal.Load()
	if j == nil || (c.Err == nil && (c.Operation == "describe" || ctx.Value(probing{}) != nil)) {
		return
	}
	entry := journal.AuditEntry{
		Actor: "process:coffer", Action: "key." + c.Operation, Target: "kek:" + c.Provider + ":" + c.Key,
		Outcome: said, RequestID: c.RequestID,
	}
	j.AuditLater(entry)
}

// outcome is the class of a provider's error in snake case.
func outcome(err error) string {
	class := kms.Class(err)
	if class == nil {
		return "failed"
	}
	return strings.ReplaceAll(strings.TrimPrefix(class.Error(), "kms: "), " ", "_")
}
