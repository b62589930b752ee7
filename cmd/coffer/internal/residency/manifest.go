// Package residency is a region's residency manifest: what the region says of
// where its data lies, signed with the region's key, and how that is held
// against the servers. docs/format/residency.md is normative.
package residency

import (
	"crypto"
	"encoding/base64"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-json-experiment/json"

	"github.com/cofferdb/coffer/journal"
)

// SignedType is the typ of a signed manifest.
const SignedType = "coffer-residency"

const version = 1

// ErrRefused means that a text is not a manifest, or not signed by the key that
// is trusted. Believe nothing that it says.
var ErrRefused = errors.New("residency: manifest refused")

// Manifest is what a region says of where its data lies.
type Manifest struct {
	Version   int        `json:"version"`
	Region    Region     `json:"region"`
	Log       string     `json:"log"       doc:"the region's log id"`
	Generated time.Time  `json:"generated"`
	NATS      NATS       `json:"nats"`
	Streams   []Stream   `json:"streams"   doc:"streams, buckets and object stores"`
	Keys      []Key      `json:"keys"      doc:"key encryption keys"`
	Endpoints []Endpoint `json:"endpoints" doc:"the region's listeners"`
	Views     Views      `json:"views"`
}

// Region is the region, as its apps' ids and the cloud provider name it.
type Region struct {
	ID     string `json:"id"`
	Place  string `json:"place"`
	Cloud  string `json:"cloud"  doc:"the cloud provider's name of the place"`
	Number int    `json:"number" doc:"the first byte of the id of each of its apps"`
}

// NATS is the region's stream store.
type NATS struct {
	Kind    string `json:"kind"    doc:"embedded or external"`
	Server  string `json:"server"  doc:"the name of the server that is spoken to"`
	Cluster string `json:"cluster" doc:"empty for a single server"`
	TLS     bool   `json:"tls"`
}

// Stream is a stream, bucket or object store.
type Stream struct {
	Name        string         `json:"name"`
	Kinds       []journal.Kind `json:"kinds"           doc:"rows of the retention table"`
	Plan        string         `json:"plan"            doc:"of messages"`
	Subjects    []string       `json:"subjects"`
	Incarnation string         `json:"incarnation"`
	Storage     string         `json:"storage"         doc:"file or memory"`
	Replicas    int            `json:"replicas"`
	Servers     []string       `json:"servers"         doc:"that hold a copy; empty for a single server"`
	Placement   Placement      `json:"placement"`
	MaxAge      int64          `json:"max_age_seconds" doc:"0: not removed by age"`
	Copies      []string       `json:"copies"          doc:"what takes its messages elsewhere or brings them here; empty"`
}

// Placement is which servers a stream asks for.
type Placement struct {
	Cluster string   `json:"cluster"`
	Tags    []string `json:"tags"`
}

// Key is a key encryption key.
type Key struct {
	Provider string `json:"provider" doc:"local, vault or awskms"`
	Key      string `json:"key"      doc:"ARN, HOST/MOUNT/KEY, or the id of a key file"`
	Region   string `json:"region"   doc:"of the service, in its own words"`
	State    string `json:"state"    doc:"enabled, disabled, pending_deletion, or unknown"`
	Primary  bool   `json:"primary"  doc:"wraps the keys of new apps"`
}

// Endpoint is a listener.
type Endpoint struct {
	Kind   string `json:"kind"   doc:"api or compat"`
	URL    string `json:"url"    doc:"that callers use"`
	Listen string `json:"listen" doc:"the address in the process"`
	TLS    bool   `json:"tls"`
}

// Views is where the views lie.
type Views struct {
	Kind      string `json:"kind"      doc:"pebble"`
	Directory string `json:"directory" doc:"local, network or unknown: the kind of file system"`
}

// Signed is the answer of a region.
type Signed struct {
	Region   string   `json:"region"`
	Manifest Manifest `json:"manifest" doc:"for people"`
	Signed   string   `json:"signed"   doc:"the manifest as a compact JWS by the region's key; this alone counts"`
}

// New returns a manifest of a region, to be filled.
func New(region journal.Region, log journal.LogID, now time.Time) Manifest {
	return Manifest{
		Version: version, Log: fmt.Sprintf("%x", log[:]), Generated: now.UTC().Truncate(time.Second),
		Region:  Region{ID: region.ID, Place: region.Place, Cloud: region.Cloud, Number: int(region.Number)},
		Streams: []Stream{}, Keys: []Key{}, Endpoints: []Endpoint{},
	}
}

// Streams are the holdings of a region, as a manifest has them.
func Streams(holdings []journal.Holding) []Stream {
	out := make([]Stream, 0, len(holdings))
	for _, h := range holdings {
		out = append(out, Stream{
			Name: h.Name, Kinds: filled(h.Kinds), Plan: h.Plan, Subjects: filled(h.Subjects), Incarnation: h.Incarnation, Storage: h.Storage,
			Replicas: h.Replicas, Servers: filled(h.Servers), Placement: Placement{Cluster: h.Cluster, Tags: filled(h.Tags)},
			MaxAge: int64(h.MaxAge / time.Second), Copies: filled(h.Copies),
		})
	}
	return out
}

// filled makes a list that JSON shows as one.
func filled[T any](list []T) []T {
	if list == nil {
		return []T{}
	}
	return list
}

// Verify checks the answer of a region with the keys that it publishes, and
// returns the manifest that was signed and the id of the key. A trusted id, when
// it is given, must be that one.
func Verify(answer, keySet []byte, trusted string) (Manifest, string, error) {
	var a struct {
		Region   string   `json:"region"`
		Manifest Manifest `json:"manifest"`
		Signed   string   `json:"signed"`
	}
	if err := json.Unmarshal(answer, &a); err != nil {
		return Manifest{}, "", fmt.Errorf("%w: the answer cannot be read", ErrRefused)
	}
	var keys jose.JSONWebKeySet
	if err := json.Unmarshal(keySet, &keys); err != nil {
		return Manifest{}, "", fmt.Errorf("%w: the region's keys cannot be read", ErrRefused)
	}
	signed, err := jose.ParseSignedCompact(a.Signed, []jose.SignatureAlgorithm{jose.EdDSA})
	if err != nil {
		return Manifest{}, "", fmt.Errorf("%w: not a compact JWS", ErrRefused)
	}
	header := signed.Signatures[0].Protected
	if header.ExtraHeaders[jose.HeaderType] != SignedType {
		return Manifest{}, "", fmt.Errorf("%w: something else was signed", ErrRefused)
	}
	if trusted != "" && header.KeyID != trusted {
		return Manifest{}, "", fmt.Errorf("%w: signed with the key %s, which is not the trusted one", ErrRefused, header.KeyID)
	}
	for _, key := range keys.Keys {
		thumbprint, err := key.Thumbprint(crypto.SHA256)
		if err != nil || base64.RawURLEncoding.EncodeToString(thumbprint) != header.KeyID {
			continue
		}
		payload, err := signed.Verify(key)
		if err != nil {
			return Manifest{}, "", fmt.Errorf("%w: the signature is wrong", ErrRefused)
		}
		m, err := parse(payload, a.Region, a.Manifest)
		return m, header.KeyID, err
	}
	return Manifest{}, "", fmt.Errorf("%w: no published key has the id that the signature names", ErrRefused)
}

func parse(payload []byte, region string, shown Manifest) (Manifest, error) {
	var m Manifest
	if err := json.Unmarshal(payload, &m, json.RejectUnknownMembers(true)); err != nil || m.Version != version {
		return m, fmt.Errorf("%w: its content cannot be read", ErrRefused)
	}
	if m.Region.ID != region {
		return m, fmt.Errorf("%w: it is of region %s", ErrRefused, m.Region.ID)
	}
	if one, two := encode(m), encode(shown); one != two {
		return m, fmt.Errorf("%w: what is shown is not what is signed", ErrRefused)
	}
	return m, nil
}

func encode(m Manifest) string {
	text, err := json.Marshal(m, json.Deterministic(true))
	if err != nil {
		return ""
	}
	return string(text)
}

// owner returns the region that a stream's name is of, "" for a name that no
// region gives.
func owner(stream string) string {
	for _, prefix := range []string{"KV_", "OBJ_"} {
		stream = strings.TrimPrefix(stream, prefix)
	}
	rest, ok := strings.CutPrefix(stream, "coffer_")
	if !ok {
		return ""
	}
	region, _, _ := strings.Cut(rest, "_")
	return region
}
