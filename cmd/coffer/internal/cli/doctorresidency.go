package cli

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/cofferdb/coffer/cmd/coffer/internal/config"
	"github.com/cofferdb/coffer/cmd/coffer/internal/node"
	"github.com/cofferdb/coffer/cmd/coffer/internal/residency"
	"github.com/cofferdb/coffer/journal/client"
)

// residency fetches and verifies the region's manifest, and compares it with the
// servers where it is told how to ask them. There is a check for each difference.
func (c *doctorCmd) residency(ctx context.Context, r *runner, cfg client.Config) []check {
	k := check{Name: "residency", Status: checkSkipped, Detail: "neither an app's credential nor COFFER_OPERATOR_TOKEN is set"}
	source, err := c.tokens(r)
	operator, operatorErr := secret(r, c.OperatorTokenFile, "COFFER_OPERATOR_TOKEN")
	switch {
	case err != nil || operatorErr != nil:
		return []check{k} // the checks before this one have told why
	case operator != "":
		cfg.OperatorToken = client.StaticToken(operator)
	case source != nil && c.App != "":
		if cfg.App, err = c.appID(); err != nil {
			return []check{k}
		}
		cfg.Token = source
	default:
		return []check{k}
	}
	m, keyID, err := fetchManifest(ctx, cfg, c.RegionKey)
	if errors.Is(err, client.ErrNotFound) && c.RegionKey == "" && c.Config == "" {
		k.Detail = "the server has no residency manifest; is it of an earlier release?"
		return []check{k}
	}
	if err != nil {
		k.Status, k.Detail = checkFailed, advise(err)
		k.Advice = "do not believe what this server says of where data lies, before you know why"
		return []check{k}
	}
	differences := residency.Check(m, time.Now())
	if app, err := c.appID(); err == nil && int(app.Region()) != m.Region.Number {
		differences = append(differences, residency.Difference{
			Part: "app " + c.App, Detail: "it is of another region than " + m.Region.ID, Advice: "set COFFER_URL to the server of the app's region",
		})
	}
	k.Status = checkOK
	k.Detail = fmt.Sprintf("region %s: %d streams, %d keys, %d listeners, signed with key %s", m.Region.ID, len(m.Streams), len(m.Keys), len(m.Endpoints), keyID)
	if c.RegionKey == "" {
		k.Advice = "keep the key's id, and give it as --region-key: the server names its key itself"
	}
	return append(append([]check{k}, faults("residency", differences)...), c.servers(ctx, r, m)...)
}

func fetchManifest(ctx context.Context, cfg client.Config, trusted string) (residency.Manifest, string, error) {
	cl, err := client.New(cfg)
	if err != nil {
		return residency.Manifest{}, "", err
	}
	defer cl.Close()
	answer, err := cl.Residency(ctx)
	if err != nil {
		return residency.Manifest{}, "", err
	}
	keys, err := cl.RegionKeys(ctx)
	if err != nil {
		return residency.Manifest{}, "", err
	}
	return residency.Verify(answer, keys, trusted)
}

// servers asks the NATS servers and key services themselves.
func (c *doctorCmd) servers(ctx context.Context, r *runner, m residency.Manifest) []check {
	k := check{Name: "servers", Status: checkSkipped, Detail: "the region's configuration is not given: --config FILE"}
	if c.Config == "" {
		return []check{k}
	}
	cfg, err := config.Load(c.Config, r.Environ)
	if err != nil {
		k.Status, k.Detail = checkFailed, err.Error()
		return []check{k}
	}
	i := slices.IndexFunc(cfg.Regions, func(region config.Region) bool { return region.ID == m.Region.ID && region.Listen != "" })
	if i < 0 {
		k.Status, k.Detail = checkFailed, c.Config+" has no region "+m.Region.ID
		k.Advice = "name the configuration of the server that COFFER_URL names"
		return []check{k}
	}
	found, err := node.Survey(ctx, cfg, cfg.Regions[i], r.log)
	if err != nil {
		k.Status, k.Detail = checkFailed, err.Error()
		k.Advice = "can this machine reach the NATS server of the configuration?"
		return []check{k}
	}
	var differences []residency.Difference
	if cfg.Regions[i].NATS.URL != "" {
		differences = residency.CompareStreams(m, found.Streams)
	}
	differences = append(append(differences, residency.CompareKeys(m, found.Keys)...), found.Refused...)
	k.Status = checkOK
	k.Detail = fmt.Sprintf("asked about %d streams and %d keys, without the region's process between", len(found.Streams), len(found.Keys))
	if len(differences) > 0 {
		k.Detail += fmt.Sprintf(": %d differences from the manifest", len(differences))
	}
	checks := append([]check{k}, faults("servers", differences)...)
	for _, key := range residency.NotAsked(m, found.Keys) {
		found.Skipped = append(found.Skipped, key+" was not asked: no setting of "+c.Config+" that was answered is for it")
	}
	for _, why := range found.Skipped {
		checks = append(checks, check{Name: "servers", Status: checkSkipped, Detail: strings.ReplaceAll(why, "\n", "; ")})
	}
	return checks
}

func faults(name string, differences []residency.Difference) []check {
	checks := make([]check, 0, len(differences))
	for _, d := range differences {
		checks = append(checks, check{Name: name, Status: checkFailed, Detail: d.String(), Advice: d.Advice})
	}
	return checks
}
