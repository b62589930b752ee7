package node

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/cofferdb/coffer/cmd/coffer/internal/auth"
	"github.com/cofferdb/coffer/cmd/coffer/internal/config"
	"github.com/cofferdb/coffer/kms"
	"github.com/cofferdb/coffer/kms/local"
)

// ErrProvider means that a region's kms setting names no provider this binary
// has. Write local:PATH.
var ErrProvider = errors.New("unknown key provider")

// openProvider opens the provider that the setting names. A new key file is
// made only for a region that has no data: for one that has, a missing file is
// a loss that must be said.
func openProvider(ctx context.Context, r config.Region, fresh bool) (kms.Provider, error) {
	scheme, rest, _ := strings.Cut(r.KMS, ":")
	if scheme != "local" || rest == "" {
		return nil, fmt.Errorf("%w: region %s: the setting begins with %q", ErrProvider, r.ID, scheme)
	}
	p, err := local.Open(ctx, local.Options{Path: rest, Create: fresh, Region: r.ID})
	if err != nil {
		return nil, fmt.Errorf("opening the key provider: %w", err)
	}
	return p, nil
}

// connectExternal connects to a NATS server outside the process. It waits for
// one that is not there yet, and reconnects for ever; but nothing is sent again
// by itself, because the journal decides what was stored.
func connectExternal(r config.Region, log *slog.Logger) (*nats.Conn, error) {
	options := []nats.Option{
		nats.Name("coffer " + r.ID),
		nats.MaxReconnects(-1),
		nats.ReconnectBufSize(-1),
		nats.ReconnectWait(250 * time.Millisecond),
		nats.ReconnectJitter(100*time.Millisecond, 250*time.Millisecond),
		nats.Timeout(5 * time.Second),
		nats.PingInterval(10 * time.Second),
		nats.MaxPingsOutstanding(2),
		nats.SyncQueueLen(1 << 18),
		nats.DisconnectErrHandler(func(_ *nats.Conn, err error) { log.Warn("NATS connection lost", "err", err) }),
		nats.ReconnectHandler(func(*nats.Conn) { log.Info("NATS connection is back") }),
		nats.ErrorHandler(func(_ *nats.Conn, _ *nats.Subscription, err error) { log.Warn("NATS connection", "err", err) }),
	}
	if r.NATS.CAFile != "" {
		options = append(options, nats.RootCAs(r.NATS.CAFile))
	}
	if r.NATS.CredentialsFile != "" {
		options = append(options, nats.UserCredentials(r.NATS.CredentialsFile))
	}
	if r.NATS.UserFile != "" {
		secret, err := auth.ReadSecret(r.NATS.UserFile)
		if err != nil {
			return nil, fmt.Errorf("nats.user_file: %w", err)
		}
		user, password, ok := strings.Cut(secret, ":")
		if !ok {
			return nil, fmt.Errorf("nats.user_file: %w: it must hold USER:PASSWORD", auth.ErrSecretFile)
		}
		options = append(options, nats.UserInfo(user, password))
	}
	conn, err := nats.Connect(r.NATS.URL, options...)
	if err != nil {
		return nil, fmt.Errorf("connecting to NATS: %w", err)
	}
	return conn, nil
}
