// Sorts a table by the column whose heading is clicked: numbers as numbers, what was not measured always last.
document.querySelectorAll("table.sortable").forEach((table) => {
  const headings = [...table.tHead.rows[0].cells];
  headings.forEach((heading, column) => {
    heading.querySelector("button").addEventListener("click", () => {
      const first = heading.dataset.first;
      const other = first === "ascending" ? "descending" : "ascending";
      const direction = heading.getAttribute("aria-sort") === first ? other : first;
      headings.forEach((each) => each.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", direction);
      const sign = direction === "ascending" ? 1 : -1;
      const body = table.tBodies[0];
      const key = (row) => row.cells[column].dataset.value;
      const compare = (a, b) => {
        const [x, y] = [key(a), key(b)];
        if (x === undefined || y === undefined) return (x === undefined) - (y === undefined);
        if (heading.dataset.kind === "number") return sign * ((Number(x) > Number(y)) - (Number(x) < Number(y)));
        return sign * x.localeCompare(y, "en", { numeric: true });
      };
      [...body.rows].sort(compare).forEach((row) => body.append(row));
    });
  });
});
