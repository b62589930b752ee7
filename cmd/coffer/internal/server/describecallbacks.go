package server

import (
	"net/http"
	"reflect"
)

// describeCallbacks adds what there is to say about webhook endpoints.
func (s *Server) describeCallbacks(all map[string]description) {
	k := s.kinds
	settings := []kind{k.endpointInvalid, k.urlForbidden, k.storeFull}
	const base = "/v1/apps/{app}/endpoints"
	const question = "/v1/apps/{app}/presend"
	all["GET "+question] = description{
		id: "presend", summary: "Whom the app asks before its messages are stored", answers: []documented{ok[presendView](http.StatusOK, "the setting, and what has become of questions")},
	}
	all["PUT "+question] = description{
		id: "setPresend", summary: "Ask an endpoint before messages are stored",
		text: "It gets a signed request `message.question` with the event in `data`, and answers within `timeout` with `{\"decision\": \"allow\"}`, `deny` with a `reason`, " +
			"or `rewrite` with a `text` that takes the place of the message's. Without such an answer `fallback` counts.",
		body: reflect.TypeFor[presendBody](), answers: []documented{ok[presendView](http.StatusOK, "the setting")}, problems: []kind{k.endpointInvalid, k.storeFull},
	}
	all["DELETE "+question] = description{
		id: "removePresend", summary: "Store messages without asking", answers: []documented{{status: http.StatusNoContent, about: "nobody is asked"}}, problems: []kind{k.storeFull},
	}
	all["GET "+base] = description{
		id: "endpoints", summary: "The app's webhook endpoints, and how far each has come",
		answers: []documented{ok[list[endpointView]](http.StatusOK, "all of them")}, problems: []kind{k.viewBehind},
	}
	all["POST "+base] = description{
		id: "createEndpoint", summary: "Make a webhook endpoint",
		text: "A signed request `endpoint.verification` is sent to it at once. When it answers 2xx with `{\"challenge\": …}`, the challenge of the request, " +
			"it is enabled and gets every event from then on; otherwise it stays `unverified` until a PATCH with `{\"state\": \"enabled\"}` repeats the request.",
		body:     reflect.TypeFor[createEndpointBody](),
		answers:  []documented{ok[endpointView](http.StatusCreated, "the endpoint with, this once, its secret")},
		problems: append(settings, k.tooMany, k.viewBehind),
	}
	all["GET "+base+"/{endpoint}"] = description{
		id: "endpoint", summary: "One endpoint", answers: []documented{ok[endpointView](http.StatusOK, "the endpoint")}, problems: []kind{k.viewBehind},
	}
	all["PATCH "+base+"/{endpoint}"] = description{
		id: "changeEndpoint", summary: "Change an endpoint",
		text: "Members that are not there stay. A new URL is verified like that of a new endpoint.",
		body: reflect.TypeFor[endpointBody](), answers: []documented{ok[endpointView](http.StatusOK, "the endpoint as it is now")}, problems: settings,
	}
	all["DELETE "+base+"/{endpoint}"] = description{
		id: "deleteEndpoint", summary: "Delete an endpoint; what it has not got is not sent",
		answers: []documented{{status: http.StatusNoContent, about: "it is gone"}}, problems: []kind{k.storeFull},
	}
	all["POST "+base+"/{endpoint}/secret-rotations"] = description{
		id: "rotateSecret", summary: "Give an endpoint a new secret; the old one signs beside it for a while", body: reflect.TypeFor[rotateSecretBody](),
		answers: []documented{ok[endpointView](http.StatusCreated, "the endpoint with, this once, its new secret")}, problems: settings,
	}
	all["POST "+base+"/{endpoint}/test"] = description{
		id: "testEndpoint", summary: "Send a signed request without an event, `endpoint.test`", answers: []documented{ok[answerView](http.StatusOK, "what became of it")},
	}
	all["GET "+base+"/{endpoint}/deliveries"] = description{
		id: "deliveries", summary: "What became of the deliveries of the last days, the newest first",
		query: map[string]parameter{
			"before": {about: "older than the one with this number", schema: text(decimalPattern)},
			"limit":  {about: "how many", schema: object{"type": "integer", "minimum": 1, "maximum": mostDeliveries}},
		},
		answers: []documented{ok[list[deliveryView]](http.StatusOK, "`next` is for `before`")}, problems: []kind{k.viewBehind},
	}
	all["POST "+base+"/{endpoint}/replays"] = description{
		id: "startReplay", summary: "Send a range of events again, or what was parked",
		text: "A range is what the endpoint's filters select between two positions or times, as far back as the plan keeps events. It is sent beside what is new, " +
			"at a rate of its own, and each event has the `webhook-id` that it had the first time. Parked deliveries go back to those that wait, and their three days begin anew.",
		body:     reflect.TypeFor[startReplayBody](),
		answers:  []documented{ok[requeued](http.StatusOK, "parked deliveries are sent again"), ok[replayView](http.StatusAccepted, "a range is sent again; `Location` says how it goes")},
		problems: []kind{k.tooMany, k.viewBehind, k.storeFull},
	}
	all["GET /v1/apps/{app}/replays/{replay}"] = description{
		id: "replayProgress", summary: "How far a replay to an endpoint has come", answers: []documented{ok[replayView](http.StatusOK, "the replay")}, problems: []kind{k.viewBehind},
	}
	all["DELETE /v1/apps/{app}/replays/{replay}"] = description{
		id: "cancelReplay", summary: "Cancel a replay to an endpoint; what was sent is not taken back",
		answers: []documented{ok[replayView](http.StatusOK, "the replay as it ended")}, problems: []kind{k.viewBehind, k.storeFull},
	}
	all["GET /v1/apps/{app}/callbacks"] = description{
		id: "pollCallbacks", summary: "What an endpoint is sent, polled",
		text: "The same events, bodies and `webhook_id`s as the endpoint's requests have, without numbers and signatures, from the endpoint's beginning or after a cursor. " +
			"`next` is always there: ask again with it.",
		query:    map[string]parameter{"after": {about: "the `next` of an answer, or a position", schema: text(placePattern)}},
		answers:  []documented{ok[list[polledView]](http.StatusOK, "the events")},
		problems: []kind{k.viewBehind, k.cursorMismatch, k.cursorExpired},
	}
}
