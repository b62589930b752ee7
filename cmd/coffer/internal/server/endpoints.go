package server

import (
	"context"
	"crypto/rand"
	"errors"
	"maps"
	"net/http"
	"slices"
	"time"

	"github.com/cofferdb/coffer/cmd/coffer/internal/deliver"
	"github.com/cofferdb/coffer/cmd/coffer/internal/endpoints"
	"github.com/cofferdb/coffer/cmd/coffer/internal/webhook"
	"github.com/cofferdb/coffer/journal"
	"github.com/cofferdb/coffer/projections"
	"github.com/cofferdb/coffer/projections/history"
)

// endpointView is an endpoint as its owner sees it.
type endpointView struct {
	ID            string            `json:"id"`
	URL           string            `json:"url"`
	Description   string            `json:"description,omitempty"`
	State         endpoints.State   `json:"state"`
	Reason        endpoints.Reason  `json:"reason,omitempty" doc:"why it is not enabled: verification, caller, gone, failing"`
	Since         string            `json:"since" doc:"of the state"`
	Created       string            `json:"created"`
	Mode          endpoints.Mode    `json:"mode"`
	Types         []string          `json:"types,omitempty"`
	Conversations []string          `json:"conversations,omitempty"`
	Users         []string          `json:"users,omitempty"`
	Ordered       bool              `json:"ordered"`
	Rate          int               `json:"rate" doc:"deliveries a second at most; 0: no limit"`
	Concurrency   int               `json:"concurrency"`
	Batch         int               `json:"batch"`
	AskedOnly     bool              `json:"asked_only"`
	Headers       []string          `json:"headers,omitempty" doc:"names; the values are not given back"`
	Encryption    string            `json:"encryption,omitempty" doc:"the public key, as a JWK"`
	MutualTLS     bool              `json:"mutual_tls"`
	AgoraAppKey   string            `json:"agora_appkey,omitempty" doc:"of the mode agora"`
	AgoraSecret   string            `json:"agora_secret,omitempty" doc:"this once: of the mode agora, what its security is made with"`
	Secrets       []secretView      `json:"secrets"`
	Secret        string            `json:"secret,omitempty" doc:"this once: what signatures are verified with"`
	Progress      *endpointProgress `json:"progress,omitempty"`
	Answer        *answerView       `json:"verification,omitempty" doc:"what became of the verification request"`
}

type secretView struct {
	Kind    webhook.Kind `json:"kind"`
	Created string       `json:"created"`
	Until   string       `json:"until,omitempty" doc:"when it stops signing"`
}

// endpointProgress is how far an endpoint has come.
type endpointProgress struct {
	Number    uint64           `json:"number,string" doc:"every event up to it has an outcome"`
	Position  journal.Position `json:"position" doc:"up to here the app's events have been looked at"`
	Delivered uint64           `json:"delivered" doc:"in the time that deliveries are kept, as the following"`
	Waiting   uint64           `json:"waiting"`
	Held      uint64           `json:"held"`
	Parked    uint64           `json:"parked"`
	Last      string           `json:"last_delivered,omitempty"`
	Failing   string           `json:"failing_since,omitempty"`
	Paused    string           `json:"paused,omitempty" doc:"keys or store: what is waited for; nothing is skipped"`
}

// answerView is what an endpoint said.
type answerView struct {
	Delivered bool   `json:"delivered"`
	Status    int    `json:"status,omitzero"`
	Cause     string `json:"cause,omitempty"`
	Error     string `json:"error,omitempty"`
}

func viewAnswer(a deliver.Answer) *answerView {
	v := &answerView{Delivered: a.Delivered(), Status: a.Status, Cause: a.Cause.String()}
	if a.Err != nil {
		v.Error = a.Err.Error()
	}
	return v
}

func millis(ms int64) string {
	if ms == 0 {
		return ""
	}
	return time.UnixMilli(ms).UTC().Format(timeLayout)
}

func viewEndpoint(e *endpoints.Endpoint) endpointView {
	v := endpointView{
		ID: e.IDText(), URL: e.URL, Description: e.Description, State: e.State, Reason: e.Reason,
		Since: e.Since.UTC().Format(timeLayout), Created: e.Created.UTC().Format(timeLayout), Mode: e.Mode,
		Conversations: e.Conversations, Users: e.Users, Ordered: e.Ordered, Rate: e.Rate,
		Concurrency: e.Concurrency, Batch: max(e.Batch, 1), AskedOnly: e.AskedOnly, Headers: slices.Sorted(maps.Keys(e.Headers)),
		Encryption: e.Encryption, MutualTLS: e.Certificate != "", AgoraAppKey: e.Agora.AppKey, Secrets: []secretView{},
	}
	if v.Concurrency == 0 {
		v.Concurrency = endpoints.DefaultConcurrency
	}
	for _, t := range e.Types {
		v.Types = append(v.Types, t.String())
	}
	for _, s := range e.Secrets {
		secret := secretView{Created: s.Created.UTC().Format(timeLayout)}
		if parsed, err := webhook.ParseSecret(string(s.Key)); err == nil {
			secret.Kind = parsed.Kind()
		}
		if !s.Until.IsZero() {
			secret.Until = s.Until.UTC().Format(timeLayout)
		}
		v.Secrets = append(v.Secrets, secret)
	}
	return v
}

// withProgress adds how far an endpoint has come, unless the view has stopped and
// nobody knows: the endpoint can still be looked at and changed.
func (s *Server) withProgress(ctx context.Context, v *endpointView, e *endpoints.Endpoint) error {
	p, err := s.callbacks.View.Progress(ctx, e.App, e.ID)
	if errors.Is(err, projections.ErrStopped) {
		return nil
	}
	if err != nil {
		return err
	}
	v.Progress = &endpointProgress{
		Number: p.Number, Position: max(p.Through, e.After), Delivered: p.Done, Waiting: p.Waiting, Held: p.Held, Parked: p.Parked,
		Last: millis(p.Delivered), Failing: millis(p.Failing), Paused: s.callbacks.Paused(endpoints.Ref{App: e.App, ID: e.ID}),
	}
	return nil
}

// endpointBody is what an endpoint is made of and changed by; a member that is
// missing leaves what there is.
type endpointBody struct {
	URL            *string            `json:"url,omitzero" doc:"https://HOST[:PORT]/PATH"`
	Description    *string            `json:"description,omitzero"`
	State          *string            `json:"state,omitzero" doc:"enabled or disabled; enabled repeats a verification that has failed"`
	Mode           *endpoints.Mode    `json:"mode,omitzero" doc:"thin, full, sealed or agora"`
	Types          *[]string          `json:"types,omitzero"`
	Conversations  *[]string          `json:"conversations,omitzero"`
	Users          *[]string          `json:"users,omitzero"`
	Ordered        *bool              `json:"ordered,omitzero"`
	Rate           *int               `json:"rate,omitzero"`
	Concurrency    *int               `json:"concurrency,omitzero"`
	Batch          *int               `json:"batch,omitzero"`
	AskedOnly      *bool              `json:"asked_only,omitzero" doc:"it gets no events; it may be asked before messages are stored"`
	Headers        *map[string]string `json:"headers,omitzero"`
	Encryption     *string            `json:"encryption,omitzero" doc:"a public JWK, as text"`
	Certificate    *string            `json:"certificate,omitzero" doc:"PEM, for mutual TLS"`
	CertificateKey *string            `json:"certificate_key,omitzero" doc:"PEM"`
	AgoraAppKey    *string            `json:"agora_appkey,omitzero" doc:"of the mode agora: what each callId begins with; ACCOUNT#APP without"`
	AgoraSecret    *string            `json:"agora_secret,omitzero" doc:"of the mode agora: what its security is made with; a new one without"`
}

type createEndpointBody struct {
	endpointBody

	Signature string `json:"signature,omitzero" doc:"hmac, the default, or ed25519"`
	Secret    string `json:"secret,omitzero" doc:"of your own: whsec_ and 24 to 64 bytes in base64, or whsk_"`
}

func set[T any](to *T, from *T) {
	if from != nil {
		*to = *from
	}
}

// apply changes an endpoint.
func (b *endpointBody) apply(s *Server, e *endpoints.Endpoint) error {
	if b.URL != nil {
		if err := s.callbacks.Transport.Check(*b.URL); err != nil {
			return err
		}
		e.URL = *b.URL
	}
	if b.Types != nil {
		e.Types = nil
		for _, name := range *b.Types {
			t, err := journal.ParseType(name)
			if err != nil {
				return &endpoints.SettingError{Pointer: "/types", Detail: "it holds what is not a type of event"}
			}
			e.Types = append(e.Types, t)
		}
	}
	set(&e.Description, b.Description)
	set(&e.Mode, b.Mode)
	set(&e.Conversations, b.Conversations)
	set(&e.Users, b.Users)
	set(&e.Ordered, b.Ordered)
	set(&e.Rate, b.Rate)
	set(&e.Concurrency, b.Concurrency)
	set(&e.Batch, b.Batch)
	set(&e.AskedOnly, b.AskedOnly)
	set(&e.Headers, b.Headers)
	set(&e.Certificate, b.Certificate)
	set((*string)(&e.CertificateKey), b.CertificateKey)
	set(&e.Agora.AppKey, b.AgoraAppKey)
	set((*string)(&e.Agora.Secret), b.AgoraSecret)
	if b.Encryption != nil {
		if *b.Encryption != "" {
			if _, err := webhook.ParseRecipient([]byte(*b.Encryption)); err != nil {
				return &endpoints.SettingError{Pointer: "/encryption", Detail: err.Error()}
			}
		}
		e.Encryption = *b.Encryption
	}
	return nil
}

// fillAgora gives an endpoint of the mode agora what its caller left out.
func fillAgora(c *call, e *endpoints.Endpoint) {
	if e.Mode != endpoints.Agora {
		return
	}
	if e.Agora.AppKey == "" {
		e.Agora.AppKey = c.app.Account + "#" + c.app.ID.String()
	}
	if e.Agora.Secret == "" {
		e.Agora.Secret = endpoints.Key(rand.Text())
	}
}

// endpointOf loads the endpoint that the path names.
func (s *Server) endpointOf(c *call) (endpoints.Endpoint, error) {
	id, err := endpoints.ParseID(c.vars["endpoint"])
	if err != nil {
		return endpoints.Endpoint{}, err
	}
	return s.callbacks.Endpoints.Endpoint(c.r.Context(), c.app.ID, id)
}

func (s *Server) listEndpoints(c *call) error {
	found, err := s.callbacks.Endpoints.Endpoints(c.r.Context(), c.app.ID)
	if err != nil {
		return err
	}
	answer := list[endpointView]{Data: []endpointView{}}
	for i := range found {
		v := viewEndpoint(&found[i])
		if err := s.withProgress(c.r.Context(), &v, &found[i]); err != nil {
			return err
		}
		answer.Data = append(answer.Data, v)
	}
	return s.writeJSON(c, http.StatusOK, answer)
}

func (s *Server) showEndpoint(c *call) error {
	e, err := s.endpointOf(c)
	if err != nil {
		return err
	}
	v := viewEndpoint(&e)
	if err := s.withProgress(c.r.Context(), &v, &e); err != nil {
		return err
	}
	return s.writeJSON(c, http.StatusOK, v)
}

// createEndpoint makes an endpoint and asks it to give a challenge back. One
// that does not is stored too, and gets nothing until it does.
func (s *Server) createEndpoint(c *call) error {
	var in createEndpointBody
	if err := s.decode(c, &in); err != nil {
		return err
	}
	ctx := c.r.Context()
	e := endpoints.Endpoint{
		App: c.app.ID, ID: endpoints.NewID(), State: endpoints.Unverified, Reason: endpoints.ReasonVerification, Mode: endpoints.Thin,
	}
	if in.URL == nil {
		return s.invalidBody("/url", "it is missing")
	}
	if err := in.apply(s, &e); err != nil {
		return err
	}
	fillAgora(c, &e)
	secret, err := in.secret(s.now())
	if err != nil {
		return err
	}
	e.Secrets = []endpoints.Secret{secret}
	if e.After, err = s.lastPosition(ctx, c.app.ID); err != nil {
		return err
	}
	if e, err = s.callbacks.Endpoints.Create(ctx, e); err != nil {
		return err
	}
	answer, verified, err := s.verify(ctx, &e)
	if err != nil {
		return err
	}
	v := viewEndpoint(&e)
	v.Secret, v.AgoraSecret, v.Answer = reveal(secret), string(e.Agora.Secret), viewAnswer(answer)
	v.Answer.Delivered = verified
	c.w.Header().Set("Location", "/v1/apps/"+c.app.ID.String()+"/endpoints/"+v.ID)
	return s.writeJSON(c, http.StatusCreated, v)
}

// verify asks an endpoint for its challenge and enables it when it gives it, unless
// it was moved or disabled meanwhile: the answer is that of the URL that was asked.
func (s *Server) verify(ctx context.Context, e *endpoints.Endpoint) (deliver.Answer, bool, error) {
	answer, ok, err := s.callbacks.Verify(ctx, e)
	if err != nil || !ok {
		return answer, false, err
	}
	asked := e.URL
	*e, err = s.callbacks.Endpoints.Change(ctx, e.App, e.ID, func(e *endpoints.Endpoint) error {
		if e.URL != asked || e.State == endpoints.Disabled {
			return endpoints.ErrChanged
		}
		e.State, e.Reason = endpoints.Enabled, ""
		return nil
	})
	if errors.Is(err, endpoints.ErrChanged) {
		return answer, false, nil
	}
	return answer, err == nil, err
}

// reveal returns what the owner of an endpoint verifies with.
func reveal(secret endpoints.Secret) string {
	parsed, err := webhook.ParseSecret(string(secret.Key))
	if err != nil {
		return "" // it was checked
	}
	return parsed.Verifier()
}

func (b *createEndpointBody) secret(now time.Time) (endpoints.Secret, error) {
	return newSecret(b.Signature, b.Secret, now)
}

// newSecret takes a caller's secret, or makes one.
func newSecret(kind, given string, now time.Time) (endpoints.Secret, error) {
	secret := endpoints.Secret{Created: now.UTC().Truncate(time.Millisecond)}
	if given != "" {
		parsed, err := webhook.ParseSecret(given)
		if err != nil || parsed.Verifier() == given && parsed.Kind() == webhook.Asymmetric {
			return secret, &endpoints.SettingError{Pointer: "/secret", Detail: "it is whsec_ or whsk_ and the key in base64"}
		}
		secret.Key = endpoints.Key(given)
		return secret, nil
	}
	if kind == "" {
		kind = string(webhook.Symmetric)
	}
	made, err := webhook.NewSecret(webhook.Kind(kind))
	if err != nil {
		return secret, &endpoints.SettingError{Pointer: "/signature", Detail: "it is hmac or ed25519"}
	}
	secret.Key = endpoints.Key(made.Reveal())
	return secret, nil
}

// lastPosition is the position of the app's newest event in the view.
func (s *Server) lastPosition(ctx context.Context, app journal.AppID) (journal.Position, error) {
	var last journal.Position
	_, err := s.history.Replay(ctx, app, history.Query{Reverse: true, Limit: 1}, func(i history.Item) error {
		last = i.Position
		return nil
	})
	return last, err
}

// changeEndpoint changes settings; enabling one that has not been verified
// verifies it.
func (s *Server) changeEndpoint(c *call) error {
	var in endpointBody
	if err := s.decode(c, &in); err != nil {
		return err
	}
	e, err := s.endpointOf(c)
	if err != nil {
		return err
	}
	ctx := c.r.Context()
	url, agoraSecret := e.URL, e.Agora.Secret
	e, err = s.callbacks.Endpoints.Change(ctx, e.App, e.ID, func(e *endpoints.Endpoint) error {
		if err := in.apply(s, e); err != nil {
			return err
		}
		fillAgora(c, e)
		return in.applyState(e, e.URL != url)
	})
	if err != nil {
		return err
	}
	var answer *answerView
	if e.State == endpoints.Unverified && (in.URL != nil || in.State != nil) {
		a, verified, err := s.verify(ctx, &e)
		if err != nil {
			return err
		}
		answer = viewAnswer(a)
		answer.Delivered = verified
	}
	v := viewEndpoint(&e)
	v.Answer = answer
	if e.Agora.Secret != agoraSecret {
		v.AgoraSecret = string(e.Agora.Secret)
	}
	return s.writeJSON(c, http.StatusOK, v)
}

// applyState enables and disables. An endpoint is enabled only at a URL that has
// been verified: one that was disabled before that, or moved while it was disabled,
// is verified when it is to be enabled.
func (b *endpointBody) applyState(e *endpoints.Endpoint, moved bool) error {
	want := e.State
	if b.State != nil {
		if want = endpoints.State(*b.State); want != endpoints.Enabled && want != endpoints.Disabled {
			return &endpoints.SettingError{Pointer: "/state", Detail: "it is enabled or disabled"}
		}
	}
	unverified := moved || e.Reason == endpoints.ReasonVerification
	switch {
	case want == endpoints.Disabled:
		e.State = endpoints.Disabled
		if unverified {
			e.Reason = endpoints.ReasonVerification
		} else if b.State != nil {
			e.Reason = endpoints.ReasonCaller
		}
	case unverified:
		e.State, e.Reason = endpoints.Unverified, endpoints.ReasonVerification
	default:
		e.State, e.Reason = endpoints.Enabled, ""
	}
	return nil
}

func (s *Server) deleteEndpoint(c *call) error {
	id, err := endpoints.ParseID(c.vars["endpoint"])
	if err != nil {
		return err
	}
	if err := s.callbacks.Endpoints.Delete(c.r.Context(), c.app.ID, id); err != nil {
		return err
	}
	c.w.WriteHeader(http.StatusNoContent)
	return nil
}

const (
	defaultOverlap = 24 * time.Hour
	maxOverlap     = 30 * 24 * time.Hour
	maxSecrets     = 4
)

type rotateSecretBody struct {
	Overlap   string `json:"overlap" doc:"how long the old secret signs beside the new one: 24h, the default, up to 720h"`
	Signature string `json:"signature" doc:"hmac or ed25519; the default is the old one's"`
	Secret    string `json:"secret" doc:"of your own"`
}

// rotateSecret gives an endpoint a new secret; the old one signs beside it for a
// while.
func (s *Server) rotateSecret(c *call) error {
	var in rotateSecretBody
	if err := s.decode(c, &in); err != nil {
		return err
	}
	overlap := defaultOverlap
	if in.Overlap != "" {
		var err error
		if overlap, err = time.ParseDuration(in.Overlap); err != nil || overlap < 0 || overlap > maxOverlap {
			return s.invalidBody("/overlap", "it is a time span from 0s to 720h")
		}
	}
	e, err := s.endpointOf(c)
	if err != nil {
		return err
	}
	var secret endpoints.Secret
	e, err = s.callbacks.Endpoints.Change(c.r.Context(), e.App, e.ID, func(e *endpoints.Endpoint) error {
		now := s.now()
		kind := in.Signature
		if old, err := webhook.ParseSecret(string(e.Secrets[0].Key)); kind == "" && err == nil {
			kind = string(old.Kind())
		}
		var err error
		if secret, err = newSecret(kind, in.Secret, now); err != nil {
			return err
		}
		old := e.Signing(now)
		if len(old) > 0 && old[0].Until.IsZero() {
			old[0].Until = now.Add(overlap).UTC().Truncate(time.Millisecond)
		}
		if e.Secrets = append([]endpoints.Secret{secret}, old...); len(e.Secrets) > maxSecrets {
			return &endpoints.SettingError{Pointer: "", Detail: "four secrets sign already; wait until one has ended"}
		}
		return nil
	})
	if err != nil {
		return err
	}
	v := viewEndpoint(&e)
	v.Secret = reveal(secret)
	return s.writeJSON(c, http.StatusCreated, v)
}

func (s *Server) testEndpoint(c *call) error {
	e, err := s.endpointOf(c)
	if err != nil {
		return err
	}
	answer, err := s.callbacks.Test(c.r.Context(), &e)
	if err != nil {
		return err
	}
	return s.writeJSON(c, http.StatusOK, viewAnswer(answer))
}

// withSetting adds the pointer of an endpoint's setting to a problem.
func withSetting(p *problem, err error) {
	if setting, ok := errors.AsType[*endpoints.SettingError](err); ok {
		p.Errors = []inputError{{Pointer: setting.Pointer, Detail: setting.Detail}}
		p.Detail = setting.Detail
	}
}
