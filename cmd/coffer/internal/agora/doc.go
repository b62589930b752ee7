// Package agora reads the history exports and post-send callbacks of Agora Chat
// (Easemob) and turns each line into a journal event; and it writes such lines.
//
// A history export is one gzip file of JSON lines per UTC hour; a line is
//
//	{"msg_id", "timestamp" (ms), "direction", "from", "to", "chat_type",
//	 "payload": {"bodies": […], "ext": {…}, "from", "to"}}
//
// Post-send callbacks have the same shape with more beside it, so they are read
// by the same rules. What is recognised, by chat_type:
//
//	chat                        message.sent in a direct conversation
//	groupchat, group            message.sent in a group
//	chatroom, room              message.sent in a chat room
//	read_ack                    receipt.read of payload.ack_message_id
//	delivery_ack                receipt.delivered of payload.ack_message_id
//	edit                        message.edited of payload.edit_message_id
//	recall                      message.recalled of recall_id or payload.ack_message_id
//
// The event's id is the msg_id, its time the timestamp, and payload.from and
// payload.to win over from and to, as the vendor advises. Whatever has no place
// in the event is kept as it was, under data.agora: the chat_type before it was
// normalised, the timestamp (an import may shift the event's time), the
// direction, and every member this package does not know.
//
// The event is complete after [journal.Event.Normalize], which also checks the ids
// and the fields of the bodies.
//
// [AppendLine] writes an event as such a line, with a member "coffer" that holds
// what the form cannot say; Parse gives the same event back
// (docs/format/export.md).
//
// [AppendCallback] writes an event as the body of a post-send or pre-send callback,
// and [ParseVerdict] reads the answer to the latter.
//
// # Limits
//
// A receipt, a recall and an edit do not always say whether they are about a
// direct conversation or a group. group_id, payload.msg_config.allow_group_ack
// and payload.meta.edit_msg.chat_type are consulted; without any of them the
// event is taken as one of a direct conversation between from and to.
//
// Parsing is pure: the same line gives the same event, always. That is what makes
// an import that is run again find what it stored before.
//
// Sources: the vendor's pages "Retrieve message history", "Set up HTTP callbacks" and
// "Callbacks and events" (docs.agora.io), and doc.easemob.com for read receipts,
// recalls, edits and the answers to pre-send callbacks.
package agora
