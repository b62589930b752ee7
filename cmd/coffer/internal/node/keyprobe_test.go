package node

import (
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cofferdb/coffer/cmd/coffer/internal/config"
	"github.com/cofferdb/coffer/cmd/coffer/internal/keyserverstest"
)

const decryptPath = "/v1/transit/decrypt/coffer-eu"

// TestDecryptWithdrawn withdraws nothing but the permission to decrypt, of which a
// key's description says nothing, and gives it back. Many who ask for readiness
// at once cost no call each.
func TestDecryptWithdrawn(t *testing.T) {
	v := keyserverstest.NewVault(t)
	// The hard limit is far away: what shows is not that keys have left memory.
	r := newKeyRegion(t, v.Setting(), config.Keys{Revalidate: config.Duration(15 * time.Minute)})
	r.process.regions[0].mu.Lock()
	r.process.regions[0].config.Keys.Revalidate = config.Duration(3 * time.Second) // of the probe alone
	r.process.regions[0].probe.next = time.Time{}
	r.process.regions[0].mu.Unlock()
	r.await("readiness", func() bool { ok, _ := r.ready(); return ok })

	before := v.Front.Count(decryptPath)
	begin := time.Now()
	var wg sync.WaitGroup
	for range 200 {
		wg.Go(func() { _, _ = r.ready() })
	}
	wg.Wait()
	probes := int(time.Since(begin)/(100*time.Millisecond)) + 2
	if n := v.Front.Count(decryptPath) - before; n > probes {
		t.Errorf("%d unwraps for 200 questions", n)
	}

	var kept []string
	for line := range strings.Lines(keyserverstest.VaultPolicy) {
		if !strings.Contains(line, "/decrypt/") {
			kept = append(kept, line)
		}
	}
	v.Call("PUT", "sys/policies/acl/coffer", map[string]any{"policy": strings.Join(kept, "")})
	var told string
	r.await("readiness that says why", func() bool {
		ok, answer := r.ready()
		told = answer
		return !ok
	})
	if !strings.Contains(told, `"part":"kms"`) || !strings.Contains(told, "access denied") {
		t.Errorf("readyz: %s", told)
	}
	r.mustAppend(r.warm) // from memory
	v.Grant()
	r.await("readiness", func() bool { ok, _ := r.ready(); return ok })
	_, log := call(t, r.process, "GET", "/v1/admin/audit", r.operator, "")
	if !strings.Contains(log, `"access_denied"`) {
		t.Error("the refusal is not in the audit log")
	}
}
