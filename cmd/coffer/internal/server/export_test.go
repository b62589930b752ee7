package server

// Row is a row of the route table, for the walk over routes and callers.
type Row struct {
	Method, Path                string
	Anyone, App, User, Operator bool
	Body                        bool
}

// Table returns the route table.
func Table() []Row {
	return rowsOf((&Server{}).routes())
}

// CompatTable returns the compatibility listener's table.
func CompatTable() []Row { return rowsOf((&Compat{}).routes()) }

func rowsOf(table []route) []Row {
	var rows []Row
	for _, r := range table {
		rows = append(rows, Row{
			Method: r.method, Path: r.path, Body: r.bodies != nil,
			Anyone: r.who&anyone != 0, App: r.who&appBackend != 0, User: r.who&endUser != 0, Operator: r.who&operator != 0,
		})
	}
	return rows
}

const KeepAlive = keepAlive
