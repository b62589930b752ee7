package server_test

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"net/http"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/cofferdb/coffer/cmd/coffer/internal/config"
)

// adminSteps is how many operations TestNothingChangesARegion tries, by the
// environment.
const adminSteps = "COFFER_TEST_ADMIN_STEPS"

// TestNothingChangesARegion does random operations of operators at the listeners
// of all four regions, many of them meant to move an app, and after each the app is
// in the region that it was made in, and in no other.
//
// The sequence is the same in every run; COFFER_TEST_ADMIN_STEPS=5000 is a long one.
func TestNothingChangesARegion(t *testing.T) {
	s := newSite(t, config.Limits{})
	steps := 250
	if text := os.Getenv(adminSteps); text != "" {
		n, err := strconv.Atoi(text)
		if err != nil {
			t.Fatal(err)
		}
		steps = n
	}
	random := rand.New(rand.NewPCG(5, uint64(steps))) //nolint:gosec // to be repeated
	names := slices.Sorted(maps.Keys(s.regions))
	home := map[string]string{} // app → region
	deleted := map[string]bool{}
	var apps, accounts []string
	for region, r := range s.regions {
		home[r["COFFER_APP"]] = region
	}
	apps = slices.Sorted(maps.Keys(home))
	at := func(region, method, path, body string) answer {
		return s.do(request{url: s.regions[region]["COFFER_URL"], method: method, path: path, token: s.operator, body: body})
	}
	pick := func(list []string) string { return list[random.IntN(len(list))] }
	plans := []string{"free", "basic", "pro", "enterprise"}
	kinds := map[string]int{}
	for step := range steps {
		region, app := pick(names), pick(apps)
		if random.IntN(3) > 0 {
			region = home[app] // where it can be done
		}
		account := "dev"
		if len(accounts) > 0 && random.IntN(2) > 0 {
			account = pick(accounts)
		}
		path, elsewhere := "/v1/admin/apps/"+app, pick(names)
		var a answer
		about := true // the operation is about the app
		kind := random.IntN(13)
		switch kind {
		case 0:
			a = at(region, "PATCH", path, `{"disabled":true}`)
		case 1:
			a = at(region, "PATCH", path, `{"disabled":false}`)
		case 2:
			a = at(region, "POST", path+"/plan", fmt.Sprintf(`{"plan":%q}`, pick(plans)))
		case 3:
			a = at(region, "POST", path+"/certificates", "")
		case 4:
			a = at(region, "DELETE", path+"/certificates/previous", "")
		case 5:
			if random.IntN(6) > 0 {
				a = at(region, "DELETE", path+"?dry_run=true", "")
			} else if a = at(region, "DELETE", path, ""); a.status < 300 {
				deleted[app] = true
			}
		case 6: // a member that there is not
			a = at(region, "PATCH", path, fmt.Sprintf(`{"disabled":false,"region":%q}`, elsewhere))
			if a.status < 400 {
				t.Fatalf("a change of the region is taken: %d %s", a.status, a.body)
			}
		case 7:
			about = false
			a = at(region, "POST", "/v1/admin/apps", fmt.Sprintf(`{"name":"x","plan":%q,"account":%q}`, pick(plans), account))
			if a.status == http.StatusCreated {
				id := a.json(t)["id"].(string)
				apps, home[id] = append(apps, id), region
			}
		case 8:
			about = false
			id := fmt.Sprintf("acct-%d", step)
			if a = at(region, "POST", "/v1/admin/accounts", fmt.Sprintf(`{"id":%q,"home":%q}`, id, []string{"", "cn"}[random.IntN(2)])); a.status == http.StatusCreated {
				accounts = append(accounts, id)
			}
		case 9:
			about = false
			a = at(region, "PUT", "/v1/admin/accounts/"+account+"/regions/"+elsewhere, "")
		case 10:
			about = false
			a = at(region, "DELETE", "/v1/admin/accounts/"+account+"/regions/"+elsewhere, "")
		case 11:
			about = false
			a = at(region, "PATCH", "/v1/admin/accounts/"+account, fmt.Sprintf(`{"disabled":%v}`, account != "dev" && random.IntN(2) > 0))
		case 12: // an app by an id of one's own
			about = false
			a = at(region, "POST", "/v1/admin/apps", fmt.Sprintf(`{"id":%q,"name":"x","plan":"free"}`, app))
			if a.status < 400 {
				t.Fatalf("an app is made by its id: %d %s", a.status, a.body)
			}
		}
		if a.status < 300 {
			kinds[strconv.Itoa(kind)]++
		}
		if a.status >= 500 {
			t.Fatalf("step %d, operation %d on %s at %s: %d %s", step, kind, app, region, a.status, a.body)
		}
		if about && region != home[app] && (a.status != http.StatusMisdirectedRequest && kind != 6 || kind == 6 && a.status < 400) {
			t.Fatalf("step %d: operation %d on an app of %s at %s: %d %s", step, kind, home[app], region, a.status, a.body)
		}
		// Where it is, and where it is not.
		for _, name := range names {
			shown := at(name, "GET", path, "")
			switch {
			case name != home[app]:
				if p := shown.json(t); shown.status != http.StatusMisdirectedRequest || p["region"] != home[app] {
					t.Fatalf("step %d: %s of %s at %s: %d %s", step, app, home[app], name, shown.status, shown.body)
				}
			case deleted[app]:
				if shown.status != http.StatusGone && shown.status != http.StatusNotFound && shown.status != http.StatusOK {
					t.Fatalf("step %d: deleted %s: %d %s", step, app, shown.status, shown.body)
				}
			case shown.status != http.StatusOK || shown.json(t)["region"] != name || shown.json(t)["id"] != app:
				t.Fatalf("step %d: %s at %s: %d %s", step, app, name, shown.status, shown.body)
			}
		}
	}
	for _, name := range names {
		list := at(name, "GET", "/v1/admin/apps", "")
		for app, region := range home {
			if in := strings.Contains(string(list.body), app); in && region != name || !in && region == name && !deleted[app] {
				t.Errorf("%s of %s in the list of %s: %v", app, region, name, in)
			}
		}
	}
	for kind := range 13 {
		if kind != 6 && kind != 12 && kinds[strconv.Itoa(kind)] == 0 {
			t.Errorf("operation %d never succeeded; the test shows nothing of it", kind)
		}
	}
	t.Logf("%d steps, %d apps, successes by operation: %v", steps, len(apps), kinds)
}
