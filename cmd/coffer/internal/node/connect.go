package node

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"strings"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/cofferdb/coffer/cmd/coffer/internal/auth"
	"github.com/cofferdb/coffer/cmd/coffer/internal/config"
)

// connectFor is how long a NATS server may take to come up after this process.
const connectFor = time.Minute

// connectExternal connects to a NATS server outside the process. It waits a
// while for one that is not there yet, and later reconnects for ever; but
// nothing is sent again by itself, because the journal decides what was stored.
func connectExternal(ctx context.Context, r config.Region, log *slog.Logger) (*nats.Conn, error) {
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
	ctx, cancel := context.WithTimeout(ctx, connectFor)
	defer cancel()
	for pause := 250 * time.Millisecond; ; pause = min(2*pause, 4*time.Second) {
		conn, err := nats.Connect(r.NATS.URL, options...)
		if err == nil {
			return conn, nil
		}
		if !absent(err) {
			return nil, fmt.Errorf("connecting to NATS: %w", err)
		}
		log.Warn("waiting for the NATS server", "err", err)
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return nil, fmt.Errorf("connecting to NATS: %w", err)
		}
	}
}

// absent reports whether a server may still come up; one that refuses the
// credentials or has a wrong certificate is there.
func absent(err error) bool {
	var refused *net.OpError
	return errors.Is(err, nats.ErrNoServers) || errors.Is(err, nats.ErrTimeout) || errors.As(err, &refused)
}
