package node

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/http"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cofferdb/coffer/cmd/coffer/internal/config"
	"github.com/cofferdb/coffer/cmd/coffer/internal/keyserverstest"
	"github.com/cofferdb/coffer/journal"
)

// keyJob runs a job on the region's keys and checks that every app came through.
func (r *keyRegion) keyJob(kind, to string) {
	r.t.Helper()
	body, err := json.Marshal(map[string]string{"kind": kind, "to": to})
	if err != nil {
		r.t.Fatal(err)
	}
	status, answer := call(r.t, r.process, "POST", "/v1/admin/keys/jobs", r.operator, string(body))
	var job struct {
		ID, State, Error     string
		Total, Done, Skipped int
	}
	if err := json.Unmarshal([]byte(answer), &job); err != nil || status != http.StatusAccepted {
		r.t.Fatalf("%s to %s: %d %s", kind, to, status, answer)
	}
	r.await("the end of a job", func() bool {
		_, answer = call(r.t, r.process, "GET", "/v1/admin/keys/jobs/"+job.ID, r.operator, "")
		if err := json.Unmarshal([]byte(answer), &job); err != nil {
			r.t.Fatal(err)
		}
		return job.State != "running"
	})
	if job.State != "done" || job.Done+job.Skipped != job.Total || job.Done == 0 {
		r.t.Fatalf("%s to %s: %s", kind, to, answer)
	}
}

// TestMoving moves a region from a file to a real Vault, to an emulator of AWS KMS
// and back, while it is written to and read, and restarts it at each station with
// its configuration as it was.
func TestMoving(t *testing.T) {
	vault, aws := keyserverstest.NewVault(t), keyserverstest.NewAWS(t, "eu-central-1")
	home := "local:" + filepath.Join(t.TempDir(), "kek")
	r := newKeyRegion(t, home, config.Keys{})
	for _, station := range []struct{ provider, setting string }{
		{"vault", vault.Setting()}, {"awskms", aws.Setting()}, {"local", home},
	} {
		stop := make(chan struct{})
		var writing sync.WaitGroup
		writing.Go(func() {
			for {
				id := fmt.Sprint("e", len(r.warm.ids))
				if status, answer := r.append(r.warm, id); status != http.StatusCreated {
					t.Errorf("append on the way to %s: %d %s", station.provider, status, answer)
				}
				if status, answer := call(t, r.process, "GET", r.cold.events(), r.cold.token, ""); status != http.StatusOK {
					t.Errorf("replay on the way to %s: %d %s", station.provider, status, answer)
				}
				select {
				case <-stop:
					return
				case <-time.After(5 * time.Millisecond):
				}
			}
		})
		r.keyJob("migrate", station.setting)
		if station.provider == "vault" {
			vault.Rotate()
			r.keyJob("rewrap", "")
		}
		r.keyJob("replace", "")
		r.keyJob("verify", "")
		close(stop)
		writing.Wait()
		if err := r.process.Close(t.Context()); err != nil {
			t.Fatal(err)
		}
		r.open()
		r.replays(r.warm)
		r.replays(r.cold)
		r.mustAppend(r.newApp())
		status, inventory := call(t, r.process, "GET", "/v1/admin/keys/inventory", r.operator, "")
		wraps := strings.Count(inventory, `"provider":`)
		if status != http.StatusOK || wraps < 3 || strings.Count(inventory, `"provider":"`+station.provider+`"`) != wraps {
			t.Errorf("at %s: %d %s", station.provider, status, inventory)
		}
	}
	_, head := call(t, r.process, "GET", "/v1/admin/audit/head", r.operator, "")
	var witness journal.AuditHead
	if err := json.Unmarshal([]byte(head), &witness); err != nil {
		t.Fatal(err)
	}
	_, log := call(t, r.process, "GET", "/v1/admin/audit", r.operator, "")
	chain, actions := journal.NewAuditChain(witness), map[string]int{}
	for line := range bytes.Lines([]byte(log)) {
		record, err := chain.Add(bytes.TrimSpace(line))
		if err != nil {
			t.Fatal(err)
		}
		actions[record.Action]++
	}
	if err := chain.Close(); err != nil {
		t.Error(err)
	}
	if actions["keys.job_started"] != 10 || actions["keys.job_finished"] != 10 || actions["key.wrap"] == 0 || actions["key.unwrap"] == 0 || actions["key.rewrap"] == 0 {
		t.Errorf("recorded: %v", actions)
	}
}
