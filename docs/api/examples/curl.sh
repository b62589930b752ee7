#!/bin/sh
# Appends an event, replays everything, reads one event of the live tail.
set -eu
token=${COFFER_TOKEN:-$(coffer token app)}
events=$COFFER_URL/v1/apps/$COFFER_APP/events

# The token goes by a file descriptor: arguments can be seen by other users.
call() {
  curl --silent --show-error --fail-with-body --cacert "$COFFER_CA" --header @- "$@" <<HEADER
Authorization: Bearer $token
HEADER
}

id=curl-$(date +%s)-$$
stored=$(call --header 'Content-Type: application/json' --data "{\"id\":\"$id\",\"type\":\"message.sent\",
  \"sender\":\"ann\",\"recipient\":\"ben\",\"data\":{\"bodies\":[{\"type\":\"txt\",\"msg\":\"Hello from curl\"}]}}" "$events")
position=$(printf %s "$stored" | sed 's/.*"position":"\([0-9]*\)".*/\1/')
echo "stored $id at $position"

# The whole range; the last line is the trailer, without it the stream was cut.
call --header 'Accept: application/x-ndjson' "$events?min_position=$position" | tail -n 1 | grep '^{"end":'

# The live tail, from just before: limit ends it after one event.
call --no-buffer --header 'Accept: text/event-stream' "$events?after=$((position - 1))&limit=1" | grep "\"id\":\"$id\""
