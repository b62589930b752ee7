package node

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/go-json-experiment/json"

	"github.com/cofferdb/coffer/journal"
)

// witnessName is a file of a region's folder that remembers which streams the
// region had. It lies outside the stream store: a store that is empty, or
// another one, would otherwise be taken for a new region, and everything that
// was acknowledged would be gone without a word.
const witnessName = "streams.json"

type witness struct {
	Version int               `json:"version"`
	Streams map[string]string `json:"streams"` // name → incarnation
}

const witnessVersion = 1

// checkWitness compares the streams with those remembered, and remembers new
// ones. It fails with journal.ErrIncarnation, naming the file and the stream,
// when one is not what it was; an operator who means it removes the file.
func checkWitness(dir string, streams []journal.StreamInfo) error {
	path := filepath.Join(dir, witnessName)
	w := witness{Version: witnessVersion, Streams: make(map[string]string)}
	text, err := os.ReadFile(path) //nolint:gosec // a file of the data directory
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return fmt.Errorf("reading the witness of the streams: %w", err)
	default:
		if err := json.Unmarshal(text, &w, json.RejectUnknownMembers(true)); err != nil || w.Version != witnessVersion {
			return fmt.Errorf("%w: the witness %s does not parse", journal.ErrIncarnation, path)
		}
	}
	changed := false
	for _, s := range streams {
		known, ok := w.Streams[s.Name]
		if ok && known != s.Incarnation {
			return fmt.Errorf("%w: %s has the incarnation %s, and %s remembers %s: the store was replaced or emptied; "+
				"put the right one back, or remove that file to begin anew", journal.ErrIncarnation, s.Name, s.Incarnation, path, known)
		}
		if !ok {
			w.Streams[s.Name], changed = s.Incarnation, true
		}
	}
	if !changed {
		return nil
	}
	if text, err = json.Marshal(w, json.Deterministic(true)); err != nil {
		return fmt.Errorf("encoding the witness of the streams: %w", err)
	}
	return writeSecret(path, append(text, '\n'))
}
