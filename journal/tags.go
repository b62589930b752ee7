package journal

import (
	"hash/maphash"
	"strings"
	"sync/atomic"

	"github.com/cofferdb/coffer/kms"
)

// tagSlots is the size of a tagCache. It is enough for what is written to at
// once; an app has many more conversations.
const tagSlots = 512

// tagCache remembers the tags of the ids that an app's events name most: the
// same conversations and users, over and over. A look-up costs a tenth of the
// keyed hash, of which an event needs three or four. It lives as long as its
// route, a minute, and no longer than the app's keys are at hand.
type tagCache struct {
	kind  string
	slots [tagSlots]atomic.Pointer[taggedID]
}

type taggedID struct {
	id  string
	tag kms.Tag
}

// tag returns the tag of an id.
func (c *tagCache) tag(seed maphash.Seed, tagger *kms.Tagger, id string) kms.Tag {
	slot := &c.slots[maphash.String(seed, id)%tagSlots]
	if known := slot.Load(); known != nil && known.id == id {
		return known.tag
	}
	tag := tagger.Tag(c.kind, id)
	// The id may be a part of a whole request.
	slot.Store(&taggedID{strings.Clone(id), tag})
	return tag
}
