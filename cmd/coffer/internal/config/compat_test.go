package config

import (
	"errors"
	"testing"
	"time"
)

func TestCompat(t *testing.T) {
	region := func(c Compat) Region {
		return Region{ID: "eu", Number: 3, Compat: c}
	}
	app := CompatApp{Name: "acme/shop", ID: "0300000000000000000000000000007f"}
	good := Compat{Listen: "0.0.0.0:8443", URL: "https://history.example.com", RecallWindow: Duration(7 * 24 * time.Hour), Apps: []CompatApp{app}}
	for _, c := range []Compat{{}, {Listen: "127.0.0.1:0"}, good} {
		if err := region(c).checkCompat(); err != nil {
			t.Errorf("%+v: %v", c, err)
		}
	}
	if id := good.Table()["acme/shop"]; id.String() != app.ID {
		t.Errorf("the table has %s", id)
	}
	for name, change := range map[string]func(*Compat){
		"no listen":   func(c *Compat) { c.Listen = "" },
		"no port":     func(c *Compat) { c.Listen = "localhost" },
		"port":        func(c *Compat) { c.Listen = "localhost:http" },
		"http":        func(c *Compat) { c.URL = "http://history.example.com" },
		"credentials": func(c *Compat) { c.URL = "https://a:b@history.example.com" },
		"window":      func(c *Compat) { c.RecallWindow++ },
		"no org":      func(c *Compat) { c.Apps = []CompatApp{{Name: "shop", ID: app.ID}} },
		"three parts": func(c *Compat) { c.Apps = []CompatApp{{Name: "a/b/c", ID: app.ID}} },
		"twice":       func(c *Compat) { c.Apps = []CompatApp{app, app} },
		"another's":   func(c *Compat) { c.Apps = []CompatApp{{Name: "a/b", ID: "0400000000000000000000000000007f"}} },
		"no id":       func(c *Compat) { c.Apps = []CompatApp{{Name: "a/b", ID: "x"}} },
	} {
		c := good
		change(&c)
		if err := region(c).checkCompat(); !errors.Is(err, ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
