package residency

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/cofferdb/coffer/journal"
)

// A Difference is something that a manifest says and that is not so, or that it
// may not say.
type Difference struct {
	Part   string // the stream, key or listener
	Detail string
	Advice string // what to do
}

// String is PART: DETAIL.
func (d Difference) String() string { return d.Part + ": " + d.Detail }

// clockSkew is how far in the future a manifest may be made.
const clockSkew = 5 * time.Minute

// Check returns what in a manifest itself breaks a rule of regions.
func Check(m Manifest, now time.Time) []Difference {
	var out []Difference
	say := func(part, advice, format string, args ...any) {
		out = append(out, Difference{Part: part, Detail: fmt.Sprintf(format, args...), Advice: advice})
	}
	if m.Generated.After(now.Add(clockSkew)) {
		say("manifest", "set the clocks of the server and of this machine", "it was made in the future, at %s", m.Generated.Format(time.RFC3339))
	}
	for _, s := range m.Streams {
		if owner(s.Name) != m.Region.ID {
			say(s.Name, adviceForeign, "a stream of region %q", owner(s.Name))
		}
		for _, c := range s.Copies {
			say(s.Name, "remove it from the stream's configuration: data of a region stays in its own streams", "its messages are copied: %s", c)
		}
		if s.Storage != "file" {
			say(s.Name, "stop the region and restore it: what is kept in memory is lost with the server", "kept in %s", s.Storage)
		}
	}
	primaries := 0
	for _, k := range m.Keys {
		if k.Primary {
			primaries++
		}
		if k.Provider == "awskms" && k.Region != m.Region.Cloud {
			say(keyName(k), "migrate the region's keys to one in "+m.Region.Cloud+": coffer keys migrate", "it is in %s, the region in %s", k.Region, m.Region.Cloud)
		}
		if k.State == "unknown" {
			say(keyName(k), "coffer keys doctor tells why", "it did not answer the region")
		}
	}
	if primaries != 1 {
		say("keys", "wait until the key service answers: coffer keys status", "%d keys are primary, want one", primaries)
	}
	if !slices.ContainsFunc(m.Endpoints, func(e Endpoint) bool { return e.Kind == "api" }) {
		say("endpoints", "is it a Coffer server of this release?", "no listener is named")
	}
	return out
}

const adviceForeign = "give each region a NATS system, or an account, of its own: regions share nothing"

// CompareStreams holds a manifest's streams against those that its servers have.
// A stream that no region of Coffer names is nobody's here, and passed over.
func CompareStreams(m Manifest, found []journal.Holding) []Difference {
	var out []Difference
	say := func(part, advice, format string, args ...any) {
		out = append(out, Difference{Part: part, Detail: fmt.Sprintf(format, args...), Advice: advice})
	}
	have := map[string]Stream{}
	for _, s := range Streams(found) {
		have[s.Name] = s
		signed := slices.ContainsFunc(m.Streams, func(w Stream) bool { return w.Name == s.Name })
		switch {
		case owner(s.Name) != "" && owner(s.Name) != m.Region.ID:
			say(s.Name, adviceForeign, "a stream of region %q on the NATS of %s", owner(s.Name), m.Region.ID)
		case owner(s.Name) == m.Region.ID && !signed:
			say(s.Name, "nothing of the region uses it: find out who made it, and delete it", "it is there, and the manifest does not name it")
		}
		for _, c := range s.Copies {
			if from, ok := strings.CutPrefix(c, "mirror "); ok && owner(from) == m.Region.ID {
				say(s.Name, "delete the mirror, or let the region's operators name why it is there", "it holds a copy of %s", from)
			} else if from, ok := strings.CutPrefix(c, "source "); ok && owner(from) == m.Region.ID {
				say(s.Name, "delete the stream, or let the region's operators name why it is there", "it holds a copy of %s", from)
			}
		}
	}
	for _, want := range m.Streams {
		got, ok := have[want.Name]
		if !ok {
			say(want.Name, "it was deleted, or this is another NATS system: restore it, or correct the address", "the manifest names it, and it is not there")
			continue
		}
		differ := func(field, advice string, signed, have any) {
			if s, h := fmt.Sprint(signed), fmt.Sprint(have); s != h {
				say(want.Name, advice, "%s: the manifest says %s, the server has %s", field, s, h)
			}
		}
		differ("incarnation", "the stream was made again, or this is another NATS system: restore the region's own", want.Incarnation, got.Incarnation)
		differ("subjects", adviceChanged, want.Subjects, got.Subjects)
		differ("storage", adviceChanged, want.Storage, got.Storage)
		differ("replicas", adviceChanged, want.Replicas, got.Replicas)
		differ("servers", "the stream was moved to other servers: are all of them in "+m.Region.Place+"? Then ask for a new manifest", want.Servers, got.Servers)
		differ("placement", adviceChanged, want.Placement, got.Placement)
		differ("max_age_seconds", adviceChanged, want.MaxAge, got.MaxAge)
		differ("copies", adviceChanged, want.Copies, got.Copies)
	}
	return out
}

const adviceChanged = "somebody has changed the stream since the manifest was made: set it back, or ask for a new manifest if it was meant"

// CompareKeys holds a manifest's keys against what the key services say. asked
// are the keys that could be asked, by what they are called.
func CompareKeys(m Manifest, asked []Key) []Difference {
	var out []Difference
	say := func(part, advice, format string, args ...any) {
		out = append(out, Difference{Part: part, Detail: fmt.Sprintf(format, args...), Advice: advice})
	}
	for _, got := range asked {
		i := slices.IndexFunc(m.Keys, func(k Key) bool { return k.Provider == got.Provider && k.Key == got.Key })
		if i < 0 {
			say(keyName(got), "is it the configuration of this region that was given? Else restart the server with it", "it is configured, and the manifest does not name it")
			continue
		}
		if want := m.Keys[i]; want.Region != got.Region {
			say(keyName(got), "the key is not where the manifest says: ask the key service's operators", "the manifest says region %q, the service %q", want.Region, got.Region)
		} else if want.State != got.State {
			say(keyName(got), "the key's state has changed since: ask for a new manifest, and see coffer keys doctor", "the manifest says %s, the service %s", want.State, got.State)
		}
	}
	return out
}

// NotAsked names the keys of a manifest that are not among those asked.
func NotAsked(m Manifest, asked []Key) (names []string) {
	for _, k := range m.Keys {
		if !slices.ContainsFunc(asked, func(a Key) bool { return a.Provider == k.Provider && a.Key == k.Key }) {
			names = append(names, keyName(k))
		}
	}
	return names
}

func keyName(k Key) string { return "key " + k.Provider + ":" + k.Key }
