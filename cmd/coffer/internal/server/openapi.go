package server

import (
	"fmt"
	"net/http"
	"reflect"
	"slices"
	"strconv"
	"strings"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/cofferdb/coffer/journal"
)

// openapi answers with the document of the interface.
func (s *Server) openapi(c *call) error {
	text, err := s.document()
	if err != nil {
		return err
	}
	return s.writeBody(c, http.StatusOK, typeJSON, text)
}

// Document returns the interface as OpenAPI 3.1, made of the route table, the
// table of problems and the types of the bodies. docs/api/openapi.json is it.
func Document() ([]byte, error) {
	return (&Server{kinds: kinds(), limits: Limits{}.withDefaults()}).buildDocument()
}

func (s *Server) buildDocument() ([]byte, error) {
	d := documenter{kinds: s.kinds, schemas: schemas{named: object{}}, descriptions: s.descriptions()}
	d.named["Event"], d.named["EventInput"] = eventSchema(true), eventSchema(false)
	paths := object{}
	for _, r := range s.routes() {
		item, ok := paths[r.path].(object)
		if !ok {
			item = object{}
			paths[r.path] = item
		}
		item[strings.ToLower(r.method)] = d.operation(r)
	}
	text, err := json.Marshal(object{
		"openapi": "3.1.0",
		"info": object{
			"title": "Coffer", "version": "1", "license": object{"name": "Apache-2.0", "identifier": "Apache-2.0"},
			"description": "Messages of chat backends: sealed, in order, for as long as the app's plan says. " +
				"Unknown and repeated query parameters, unknown members and duplicate names are refused. " +
				"A path with another method is 405 `method-not-allowed`; every GET answers HEAD too.",
		},
		"servers":    []object{{"url": "/"}},
		"paths":      paths,
		"components": object{"schemas": d.named, "securitySchemes": securitySchemes()},
	}, json.Deterministic(true))
	if err != nil {
		return nil, fmt.Errorf("encoding the OpenAPI document: %w", err)
	}
	value := jsontext.Value(text)
	if err := value.Indent(jsontext.WithIndent(" ")); err != nil {
		return nil, fmt.Errorf("indenting the OpenAPI document: %w", err)
	}
	return append(value, '\n'), nil
}

func securitySchemes() object {
	token := func(about string) object {
		return object{"type": "http", "scheme": "bearer", "description": about}
	}
	return object{
		"app":      token("AccessToken2 with chat privilege 2: the app's backend"),
		"user":     token("AccessToken2 with chat privilege 1: one user of the app"),
		"operator": token("the operators' token of the region"),
	}
}

type documenter struct {
	schemas

	kinds        kindTable
	descriptions map[string]description
}

func (d *documenter) operation(r route) object {
	about := d.descriptions[r.method+" "+r.path]
	op := object{"summary": about.summary, "operationId": about.id, "responses": d.responses(r, about)}
	if about.text != "" {
		op["description"] = about.text
	}
	security := []object{}
	for _, name := range r.callers() {
		security = append(security, object{name: []string{}})
	}
	op["security"] = security
	if parameters := d.parameters(r, about); len(parameters) > 0 {
		op["parameters"] = parameters
	}
	if r.bodies != nil {
		content := object{}
		for _, media := range r.bodies {
			content[media] = object{"schema": d.bodySchema(about.body, media)}
		}
		op["requestBody"] = object{"required": true, "content": content, "description": fmt.Sprintf("at most %d bytes", r.limit)}
	}
	return op
}

func (r route) callers() []string {
	var names []string
	for _, k := range []struct {
		bit  callers
		name string
	}{{appBackend, "app"}, {endUser, "user"}, {operator, "operator"}} {
		if r.who&k.bit != 0 {
			names = append(names, k.name)
		}
	}
	return names
}

// bodySchema is a type's, or for events what the media type says.
func (d *documenter) bodySchema(t reflect.Type, media string) object {
	event := object{"$ref": "#/components/schemas/EventInput"}
	if media == typeAny {
		return object{"type": "string", "format": "binary"}
	}
	if t != reflect.TypeFor[journal.Event]() {
		return d.request(t)
	}
	batch := object{"type": "array", "items": event, "minItems": 1, "maxItems": 1000}
	switch media {
	case typeJSON:
		return object{"oneOf": []object{event, batch}}
	case typeEvent:
		return event
	case typeEventBatch:
		return batch
	}
	return object{"type": "string", "description": "an event's JSON on each line"}
}

// request is a body that callers send: all members may be left out unless the
// type says otherwise, which a handler then refuses by itself.
func (d *documenter) request(t reflect.Type) object {
	if t.Kind() != reflect.Struct || t == reflect.TypeFor[profileObject]() {
		return d.of(t)
	}
	schema := d.members(t)
	delete(schema, "required")
	var required []string
	for field := range t.Fields() {
		if _, ok := field.Tag.Lookup("required"); ok {
			name, _, _ := strings.Cut(field.Tag.Get("json"), ",")
			required = append(required, name)
		}
	}
	if required != nil {
		schema["required"] = required
	}
	return schema
}

func (d *documenter) parameters(r route, about description) []object {
	var out []object
	for part := range strings.SplitSeq(r.path, "/") {
		if name, ok := strings.CutPrefix(part, "{"); ok {
			p := pathParameters()[strings.TrimSuffix(name, "}")]
			out = append(out, object{"name": strings.TrimSuffix(name, "}"), "in": "path", "required": true, "schema": p.schema, "description": p.about})
		}
	}
	for _, name := range r.query {
		p, ok := about.query[name]
		if !ok {
			p = queryParameters()[name]
		}
		out = append(out, object{"name": name, "in": "query", "schema": p.schema, "description": p.about})
	}
	for _, p := range about.headers {
		out = append(out, object{"name": p.name, "in": "header", "schema": p.schema, "description": p.about})
	}
	return out
}

func (d *documenter) responses(r route, about description) object {
	out := object{}
	for _, a := range about.answers {
		response := object{"description": a.about}
		content := object{}
		switch {
		case a.event:
			content[typeJSON] = object{"schema": object{"$ref": "#/components/schemas/Event"}}
		case a.body != nil:
			content[typeJSON] = object{"schema": d.of(a.body)}
		}
		for media, what := range a.streams {
			if media == typeAny { // bytes have no schema (OpenAPI 3.1, section 4.14.3)
				content[media] = object{}
				continue
			}
			content[media] = object{"schema": object{"type": "string", "description": what}}
		}
		if len(content) > 0 {
			response["content"] = content
		}
		out[strconv.Itoa(a.status)] = response
	}
	for status, codes := range d.problems(r, about) {
		schema := object{
			"allOf":      []object{d.of(reflect.TypeFor[problem]())},
			"properties": object{"code": object{"enum": codes}},
		}
		response := object{"description": strings.Join(codes, ", "), "content": object{"application/problem+json": object{"schema": schema}}}
		if headers := problemHeaders(status); headers != nil {
			response["headers"] = headers
		}
		if existing, ok := out[strconv.Itoa(status)].(object); ok { // readyz
			existing["content"].(object)["application/problem+json"] = object{"schema": schema} //nolint:forcetypeassert // made above
			continue
		}
		out[strconv.Itoa(status)] = response
	}
	return out
}

func problemHeaders(status int) object {
	text := object{"type": "string"}
	switch status {
	case http.StatusUnauthorized:
		return object{"WWW-Authenticate": object{"schema": text, "required": true}}
	case http.StatusTooManyRequests:
		return object{"Retry-After": object{"schema": object{"type": "string", "pattern": decimalPattern}, "required": true, "description": "seconds"}}
	case http.StatusServiceUnavailable, http.StatusInsufficientStorage:
		return object{"Retry-After": object{"schema": object{"type": "string", "pattern": decimalPattern}, "description": "seconds"}}
	}
	return nil
}

// problems lists the codes of a route by status: what its place in the table
// brings with it, and what its description adds.
func (d *documenter) problems(r route, about description) map[int][]string {
	k := d.kinds
	list := slices.Concat([]kind{k.invalidRequest, k.internal}, about.problems)
	if r.who != anyone {
		list = append(list, k.tokenInvalid, k.tokenExpired, k.privilegeMissing, k.notFound, k.overloaded,
			k.dataCorrupt, k.kmsUnavailable, k.storeUnavailable, k.storeInconsistent)
	}
	if r.ofApp() {
		list = append(list, k.appDisabled, k.wrongRegion)
	}
	if strings.HasPrefix(r.path, "/v1/admin/apps") || strings.HasPrefix(r.path, "/v1/admin/accounts") {
		list = append(list, k.deleted)
	}
	if r.bodies != nil {
		list = append(list, k.requestTimeout, k.payloadTooLarge, k.unsupportedType, k.overloaded)
	}
	out := map[int][]string{}
	for _, one := range list {
		if !slices.Contains(out[one.status], one.code) {
			out[one.status] = append(out[one.status], one.code)
		}
	}
	for _, codes := range out {
		slices.Sort(codes)
	}
	return out
}
