// Command localkms is the AWS KMS emulator github.com/nsmithuk/local-kms (MIT)
// on a loopback address chosen by the caller, for tests.
//
// Its own main listens on every interface at a fixed port and prints its
// address among coloured log lines, so this one calls its request handler
// instead. It stands in a module of its own because nothing that coffer ships
// may depend on it. It neither checks signatures nor knows IAM.
//
// The first line of its standard output is its URL. It ends when its standard
// input ends, so that a killed test leaves no server behind.
package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"time"

	"github.com/nsmithuk/local-kms/src"
	"github.com/nsmithuk/local-kms/src/config"
	"github.com/nsmithuk/local-kms/src/data"
)

func main() {
	addr := flag.String("addr", "127.0.0.1:0", "loopback address to listen on; port 0 takes a free one")
	storage := flag.String("storage", "", "directory of the emulator's database; empty makes a temporary one")
	region := flag.String("region", "eu-west-2", "region in the ARNs it makes")
	account := flag.String("account", "111122223333", "account in the ARNs it makes")
	flag.Parse()
	config.AWSRegion, config.AWSAccountId = *region, *account
	if err := serve(*addr, *storage); err != nil {
		fmt.Fprintln(os.Stderr, "localkms:", err)
		os.Exit(1)
	}
}

func serve(addr, storage string) error {
	bind, err := netip.ParseAddrPort(addr)
	if err != nil {
		return fmt.Errorf("reading -addr: %w", err)
	}
	if !bind.Addr().IsLoopback() {
		return errors.New("this server is for tests and listens on loopback only")
	}
	if storage == "" {
		if storage, err = os.MkdirTemp("", "localkms-*"); err != nil {
			return err
		}
		defer os.RemoveAll(storage)
	}
	database := data.NewDatabase(storage)
	defer database.Close()
	ln, err := net.Listen("tcp", bind.String())
	if err != nil {
		return err
	}
	server := &http.Server{
		ReadHeaderTimeout: 10 * time.Second,
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			src.HandleRequest(w, r, database)
		}),
	}
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		_ = server.Close()
	}()
	fmt.Println("http://" + ln.Addr().String())
	if err := server.Serve(ln); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}
