// Package roaming is the view of users: which conversations somebody takes part
// in, what is unread in them, who has received what, and the inbox.
//
// # Promises
//
// The view holds tags and numbers, no record, no id and no key: what it finds it
// names by position, and who may open events reads them from the history view. It
// can be deleted at any time and is rebuilt from the journal; the rebuilt view
// answers as the old one did. [View.TakesPart] is what the server asks before it
// shows a user anything of a conversation, so it errs on the side of no: what has
// left the retention lets nobody in.
//
// # Cost
//
// A message costs four small keys, and five with a recipient, however many members
// the conversation has: nothing is written per member. A list of conversations
// costs a look-up for each conversation of the user, and up to [MaxUnread] index
// entries for each one on the page. A page of the inbox costs a look-up for each
// conversation of the user and what it returns. Expiry costs what it removes.
//
// # Limits
//
// A membership lasts as long as the plan keeps an event that speaks of it. Unread
// messages are counted up to [MaxUnread].
//
// The tables are in docs/format/views.md; the reasons in
// docs/adr/0008-who-takes-part.md.
package roaming
