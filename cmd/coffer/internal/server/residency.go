package server

import (
	"net/http"

	"github.com/cofferdb/coffer/cmd/coffer/internal/residency"
)

// residencyManifest says, signed, where the region's data lies.
func (s *Server) residencyManifest(c *call) error {
	m, err := s.residency(c.r.Context())
	if err != nil {
		return err
	}
	signed, err := s.signing.Sign(c.r.Context(), residency.SignedType, m)
	if err != nil {
		return err
	}
	return s.writeJSON(c, http.StatusOK, residency.Signed{Region: s.region.ID, Manifest: m, Signed: signed})
}

func (s *Server) residencyRoutes() []route {
	return []route{{method: "GET", path: "/v1/region", who: appBackend | operator, handle: (*Server).residencyManifest}}
}

// describeResidency adds what there is to say about the residency manifest.
func (s *Server) describeResidency(all map[string]description) {
	k := s.kinds
	all["GET /v1/region"] = description{
		id: "region", summary: "Where the region's data lies: streams, keys, listeners, signed",
		text: "The residency manifest: what the region's process finds when it is asked, signed with the region's key. " +
			"`docs/format/residency.md` fixes it, and a script beside that page verifies it; `coffer doctor` compares it with the servers.",
		answers:  []documented{ok[residency.Signed](http.StatusOK, "the manifest, for people and signed")},
		problems: []kind{k.kmsUnavailable, k.storeUnavailable, k.dataCorrupt},
	}
}
