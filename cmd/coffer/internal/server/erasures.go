package server

import (
	"fmt"
	"net/http"
	"reflect"

	"github.com/go-json-experiment/json"

	"github.com/cofferdb/coffer/cmd/coffer/internal/erasures"
	"github.com/cofferdb/coffer/journal"
)

type (
	eraseBody struct {
		User string `json:"user" required:""`
	}
	registeredAnswer struct {
		Registered bool `json:"registered" doc:"whether the user had been erased"`
	}
	applyBody struct {
		Receipts []string `json:"receipts" required:""`
	}
	appliedAnswer struct {
		Data []erasures.Receipt `json:"data"`
	}
	regionKeys struct {
		Keys []publicKey `json:"keys" doc:"a JSON Web Key Set (RFC 7517)"`
	}
	// publicKey is an Ed25519 key as RFC 8037 has it.
	publicKey struct {
		Type      string `json:"kty" doc:"OKP"`
		Curve     string `json:"crv" doc:"Ed25519"`
		X         string `json:"x"   doc:"the key, base64url"`
		ID        string `json:"kid" doc:"its thumbprint (RFC 7638)"`
		Algorithm string `json:"alg" doc:"EdDSA"`
		Use       string `json:"use" doc:"sig"`
	}
)

// maxReceipts is how many receipts a request may bring.
const maxReceipts = 1000

// eraseUser accepts an erasure, and has mostly done it when it answers.
func (s *Server) eraseUser(c *call) error {
	var in eraseBody
	if err := s.decode(c, &in); err != nil {
		return err
	}
	if err := journal.CheckUserID(in.User); err != nil {
		return s.invalidBody("/user", err.Error())
	}
	e, err := s.erasures.Request(c.r.Context(), c.caller.actor(), c.app.ID, in.User)
	if err != nil {
		return err
	}
	c.w.Header().Set("Location", "/v1/apps/"+c.app.ID.String()+"/erasures/"+e.ID)
	return s.writeJSON(c, http.StatusAccepted, e)
}

func (s *Server) oneErasure(c *call) error {
	e, err := s.erasures.Erasure(c.r.Context(), c.app.ID, c.vars["erasure"])
	if err != nil {
		return err
	}
	return s.writeJSON(c, http.StatusOK, e)
}

// registerUser gives an erased user a new key.
func (s *Server) registerUser(c *call) error {
	if err := journal.CheckUserID(c.vars["user"]); err != nil {
		return s.invalidParameter("user", err.Error())
	}
	registered, err := s.erasures.Register(c.r.Context(), c.caller.actor(), c.app.ID, c.vars["user"])
	if err != nil {
		return err
	}
	return s.writeJSON(c, http.StatusOK, registeredAnswer{registered})
}

// listReceipts sends every receipt of the region, one on a line, to be kept apart
// from the backups.
func (s *Server) listReceipts(c *call) error {
	out := s.newLines(c)
	err := s.erasures.Receipts(c.r.Context(), func(receipt string) error { return out.encode(receiptLine{receipt}) })
	if err != nil {
		return err
	}
	return out.flush()
}

type receiptLine struct {
	Receipt string `json:"receipt"`
}

// applyReceipts does the erasures of receipts again, after a restore.
func (s *Server) applyReceipts(c *call) error {
	var in applyBody
	if err := s.decode(c, &in); err != nil {
		return err
	}
	if len(in.Receipts) > maxReceipts {
		return s.invalidBody("/receipts", "too many at once")
	}
	answer := appliedAnswer{Data: []erasures.Receipt{}}
	for _, text := range in.Receipts {
		receipt, err := s.erasures.Apply(c.r.Context(), text)
		if err != nil {
			return err
		}
		s.audit(c, "user.erased_again", "app:"+receipt.App, map[string]string{"subject": receipt.Subject, "erasure": receipt.Erasure})
		answer.Data = append(answer.Data, receipt)
	}
	return s.writeJSON(c, http.StatusOK, answer)
}

// regionKeys publishes the key that the region signs with.
func (s *Server) regionKeys(c *call) error {
	key, err := s.signing.Public(c.r.Context())
	if err != nil {
		return err
	}
	text, err := key.MarshalJSON()
	if err != nil {
		return fmt.Errorf("encoding a key: %w", err)
	}
	var shown publicKey
	if err := json.Unmarshal(text, &shown); err != nil {
		return fmt.Errorf("encoding a key: %w", err)
	}
	return s.writeJSON(c, http.StatusOK, regionKeys{Keys: []publicKey{shown}})
}

func (s *Server) erasureRoutes() []route {
	const app = "/v1/apps/{app}"
	return []route{
		{method: "GET", path: "/v1/region/keys", who: anyone, handle: (*Server).regionKeys},
		{method: "POST", path: app + "/erasures", who: appBackend, bodies: []string{typeJSON}, limit: 4 << 10, handle: (*Server).eraseUser},
		{method: "GET", path: app + "/erasures/{erasure}", who: appBackend, handle: (*Server).oneErasure},
		{method: "POST", path: app + "/users/{user}/registrations", who: appBackend, handle: (*Server).registerUser},
		{method: "GET", path: "/v1/admin/erasures", who: operator, handle: (*Server).listReceipts},
		{method: "POST", path: "/v1/admin/erasures", who: operator, bodies: []string{typeJSON}, limit: 4 << 20, handle: (*Server).applyReceipts},
	}
}

// describeErasures adds what there is to say about erasing users.
func (s *Server) describeErasures(all map[string]description) {
	k := s.kinds
	all["GET /v1/region/keys"] = description{
		id: "regionKeys", summary: "The keys that the region signs with",
		answers: []documented{ok[regionKeys](http.StatusOK, "a JSON Web Key Set")}, problems: []kind{k.kmsUnavailable, k.storeUnavailable, k.dataCorrupt},
	}
	all["POST /v1/apps/{app}/erasures"] = description{
		id: "eraseUser", summary: "Erase a user",
		text: "The user's key is destroyed, and with it everything that was sealed under it, in every copy. It is accepted once it is durable; " +
			"mostly it is done when this answers. Asking again changes nothing. New events of the user are refused with 409 `user-erased` until it is registered again.",
		body:     reflect.TypeFor[eraseBody](),
		answers:  []documented{ok[erasures.Erasure](http.StatusAccepted, "the erasure; `Location` says how it goes")},
		problems: []kind{k.storeFull},
	}
	all["GET /v1/apps/{app}/erasures/{erasure}"] = description{
		id: "erasure", summary: "An erasure, with its receipt once it is done", answers: []documented{ok[erasures.Erasure](http.StatusOK, "the erasure")},
	}
	all["POST /v1/apps/{app}/users/{user}/registrations"] = description{
		id: "registerUser", summary: "Register an erased user again, under a new key",
		text:    "What was sealed before stays erased. A user that was not erased needs no registration, and is left as it is.",
		answers: []documented{ok[registeredAnswer](http.StatusOK, "what was done")}, problems: []kind{k.storeFull},
	}
	all["GET /v1/admin/erasures"] = description{
		id: "receipts", summary: "The receipts of all erasures, to be kept apart from backups",
		answers: []documented{{status: http.StatusOK, about: "a receipt on each line", streams: map[string]string{typeNDJSON: "JSON lines"}}},
	}
	all["POST /v1/admin/erasures"] = description{
		id: "applyReceipts", summary: "Do the erasures of receipts again, on a region restored from a backup", body: reflect.TypeFor[applyBody](),
		answers: []documented{ok[appliedAnswer](http.StatusOK, "what they say")}, problems: []kind{k.storeFull},
	}
}
