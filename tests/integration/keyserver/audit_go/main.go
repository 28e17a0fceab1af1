// Verifies an audit log with golang.org/x/mod/sumdb alone: the note, every tile, every record, and the growth since an older checkpoint.
package main

import (
	"encoding/base64"
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"
)

const height = 8

// tiles reads tiles as C2SP tlog-tiles lays them out: as in sumdb, but without the height in the path.
type tiles struct{ directory string }

func (t tiles) Height() int                         { return height }
func (t tiles) SaveTiles(_ []tlog.Tile, _ [][]byte) {}
func (t tiles) path(tile tlog.Tile) string {
	return filepath.Join(t.directory, strings.Replace(tile.Path(), fmt.Sprintf("tile/%d/", height), "tile/", 1))
}
func (t tiles) ReadTiles(wanted []tlog.Tile) ([][]byte, error) {
	var all [][]byte
	for _, tile := range wanted {
		data, err := os.ReadFile(t.path(tile))
		if err != nil {
			whole := tile
			whole.W = 1 << height
			if data, err = os.ReadFile(t.path(whole)); err != nil {
				return nil, err
			}
		}
		if len(data) < tile.W*tlog.HashSize {
			return nil, fmt.Errorf("%s is too short", t.path(tile))
		}
		all = append(all, data[:tile.W*tlog.HashSize])
	}
	return all, nil
}

func open(path string, verifier note.Verifier) tlog.Tree {
	data, err := os.ReadFile(path)
	check(err)
	opened, err := note.Open(data, note.VerifierList(verifier))
	check(err)
	lines := strings.Split(opened.Text, "\n")
	size, err := strconv.ParseInt(lines[1], 10, 64)
	check(err)
	root, err := base64.StdEncoding.DecodeString(lines[2])
	check(err)
	tree := tlog.Tree{N: size}
	copy(tree.Hash[:], root)
	return tree
}

func main() {
	directory := os.Args[1]
	vkey, err := os.ReadFile(filepath.Join(directory, "log.vkey"))
	check(err)
	verifier, err := note.NewVerifier(strings.TrimSpace(string(vkey)))
	check(err)
	tree := open(filepath.Join(directory, "checkpoint"), verifier)
	reader := tlog.TileHashReader(tree, tiles{directory})
	for first := int64(0); first < tree.N; first += 1 << height {
		width := tree.N - first
		if width > 1<<height {
			width = 1 << height
		}
		bundle := tlog.Tile{H: height, L: -1, N: first >> height, W: int(width)}
		name := filepath.Join(directory, strings.Replace(bundle.Path(), fmt.Sprintf("tile/%d/data", height), "tile/entries", 1))
		data, err := os.ReadFile(name)
		check(err)
		for at := first; len(data) > 0; at++ {
			length := int(binary.BigEndian.Uint16(data))
			record := data[2 : 2+length]
			data = data[2+length:]
			proof, err := tlog.ProveRecord(tree.N, at, reader)
			check(err)
			check(tlog.CheckRecord(proof, tree.N, tree.Hash, at, tlog.RecordHash(record)))
		}
	}
	for _, path := range os.Args[2:] {
		older := open(path, verifier)
		proof, err := tlog.ProveTree(tree.N, older.N, reader)
		check(err)
		check(tlog.CheckTree(proof, tree.N, tree.Hash, older.N, older.Hash))
	}
	fmt.Printf("verified %d\n", tree.N)
}

func check(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
