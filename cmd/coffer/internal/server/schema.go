package server

import (
	"encoding"
	"reflect"
	"strings"
	"time"

	"github.com/go-json-experiment/json/jsontext"
)

// object is a JSON object of the OpenAPI document.
type object = map[string]any

// schemas makes JSON Schemas (2020-12, which OpenAPI 3.1 uses) of the Go types
// that the server encodes. It knows what the bodies here use and nothing more:
// generators at hand follow encoding/json, not the rules of json v2 that the
// server has, and cannot name unexported and generic types.
type schemas struct {
	named object // components/schemas
}

// of returns the schema of a type; a named struct becomes a reference.
func (s *schemas) of(t reflect.Type) object {
	switch t {
	case reflect.TypeFor[time.Time]():
		return object{"type": "string", "format": "date-time"}
	case reflect.TypeFor[profileObject]():
		return object{"type": "object"}
	case reflect.TypeFor[jsontext.Value]():
		return object{"$ref": "#/components/schemas/Event"} // the only raw JSON that is sent
	}
	if either, ok := reflect.TypeAssert[interface{ types() []reflect.Type }](reflect.Zero(t)); ok {
		var choice []object
		for _, one := range either.types() {
			choice = append(choice, s.of(one))
		}
		return object{"oneOf": choice}
	}
	if t.Kind() != reflect.Pointer && (t.Implements(reflect.TypeFor[encoding.TextMarshaler]()) || t.Implements(reflect.TypeFor[encoding.TextAppender]())) {
		return object{"type": "string"}
	}
	switch t.Kind() { //nolint:exhaustive // what JSON has
	case reflect.Bool:
		return object{"type": "boolean"}
	case reflect.String:
		return object{"type": "string"}
	case reflect.Int, reflect.Int8, reflect.Int16, reflect.Int32, reflect.Int64,
		reflect.Uint, reflect.Uint8, reflect.Uint16, reflect.Uint32, reflect.Uint64:
		return object{"type": "integer"}
	case reflect.Float32, reflect.Float64:
		return object{"type": "number"}
	case reflect.Slice, reflect.Array:
		return object{"type": "array", "items": s.of(t.Elem())}
	case reflect.Map:
		return object{"type": "object", "additionalProperties": s.of(t.Elem())}
	case reflect.Pointer:
		return s.of(t.Elem())
	case reflect.Struct:
		name := schemaName(t)
		if name == "" {
			return s.members(t)
		}
		if _, ok := s.named[name]; !ok {
			s.named[name] = object{} // a type may contain itself
			s.named[name] = s.members(t)
		}
		return object{"$ref": "#/components/schemas/" + name}
	}
	return object{}
}

func schemaName(t reflect.Type) string {
	name := t.Name()
	if name == "" || strings.Contains(name, "[") {
		return ""
	}
	name = strings.ToUpper(name[:1]) + name[1:]
	if pkg := t.PkgPath(); strings.HasSuffix(pkg, "/keys") {
		name = "Keys" + name
	} else if strings.HasSuffix(pkg, "/kms") {
		name = "Kms" + name
	} else if strings.HasSuffix(pkg, "/deletion") {
		name = "Deletion" + name
	} else if strings.HasSuffix(pkg, "/residency") {
		name = "Residency" + name
	}
	return name
}

func (s *schemas) members(t reflect.Type) object {
	properties, required := object{}, []string{}
	s.collect(t, properties, &required)
	schema := object{"type": "object", "properties": properties, "additionalProperties": false}
	if len(required) > 0 {
		schema["required"] = required
	}
	return schema
}

// collect adds the members of a struct; an embedded one gives its own.
func (s *schemas) collect(t reflect.Type, properties object, required *[]string) {
	for field := range t.Fields() {
		tag, tagged := field.Tag.Lookup("json")
		name, options, _ := strings.Cut(tag, ",")
		switch {
		case field.Anonymous && !tagged:
			s.collect(field.Type, properties, required)
			continue
		case name == "-" || !tagged:
			continue
		}
		schema := s.of(field.Type)
		if strings.Contains(options, "string") {
			schema = object{"type": "string", "pattern": decimalPattern}
		}
		optional := strings.Contains(options, "omit")
		if field.Type.Kind() == reflect.Pointer && !optional {
			schema["type"] = []string{"string", "null"} // cursors are the only ones
		}
		if about := field.Tag.Get("doc"); about != "" {
			schema["description"] = about
		}
		properties[name] = schema
		if !optional {
			*required = append(*required, name)
		}
	}
}
