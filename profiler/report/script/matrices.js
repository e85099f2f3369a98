// The trace's numbers as the page holds them, and matrices as profiler/report/matrices.py packs them.
const DATA = JSON.parse(document.getElementById("report-data").textContent);

async function inflate(base64) {
  const packed = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

// Rows of shares; entry = scale · (level / 255)².
async function decodeMatrix(matrix) {
  const levels = await inflate(matrix.data);
  const size = DATA.experts;
  return Array.from({ length: size }, (_, row) =>
    Array.from(levels.subarray(row * size, (row + 1) * size), (level) => matrix.scale * (level / 255) ** 2),
  );
}
