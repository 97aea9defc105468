// What the page can do beyond reading: theme, search, copying, the place on the page, the drawer on a phone, the story, what has been read.
const $ = (selector, from = document) => from.querySelector(selector)
const $$ = (selector, from = document) => [...from.querySelectorAll(selector)]
const root = document.body.dataset.root

// Theme ---------------------------------------------------------------------------------------------------------

const themeSwitch = $('.theme-switch')

function nameSwitch() {
  const other = document.documentElement.dataset.theme === 'dark' ? 'light' : 'dark'
  themeSwitch.setAttribute('aria-label', `Switch to the ${other} theme`)
  themeSwitch.title = `Switch to the ${other} theme`
  return other
}

themeSwitch.hidden = false
themeSwitch.addEventListener('click', () => {
  const theme = nameSwitch()
  document.documentElement.dataset.theme = theme
  try { localStorage.setItem('theme', theme) } catch { /* a private window forgets */ }
  nameSwitch()
})
matchMedia('(prefers-color-scheme: dark)').addEventListener('change', nameSwitch)
nameSwitch()

// Code: a button that copies, and keyboard access to what scrolls --------------------------------------------------

function addCopyButton(pre) {
  const button = document.createElement('button')
  button.type = 'button'
  button.className = 'copy'
  button.textContent = 'Copy'
  button.addEventListener('click', async () => {
    button.textContent = await copied(pre.innerText.replace(/\n$/, '')) ? 'Copied' : 'Select and copy by hand'
    setTimeout(() => { button.textContent = 'Copy' }, 1600)
  })
  pre.parentElement.append(button)
}

async function copied(text) {
  try {
    await navigator.clipboard.writeText(text)
    return true
  } catch {
    const area = Object.assign(document.createElement('textarea'), { value: text, className: 'unseen' })
    document.body.append(area)
    area.select()
    const done = document.execCommand('copy')
    area.remove()
    return done
  }
}

$$('div.sourceCode > pre').forEach(addCopyButton)

function reachScrollers() {
  for (const box of $$('pre, .table-scroll, .equation-body, .panel-grid')) {
    if (box.scrollWidth > box.clientWidth + 1) box.tabIndex = 0
    else box.removeAttribute('tabindex')
  }
}
addEventListener('resize', reachScrollers)
addEventListener('load', reachScrollers)

// Headings: a link to each -----------------------------------------------------------------------------------------

for (const heading of $$('main :is(h2, h3, h4)[id]')) {
  const link = document.createElement('a')
  link.className = 'anchor'
  link.href = '#' + heading.id
  link.setAttribute('aria-label', `Link to “${heading.textContent.trim()}”`)
  heading.append(link)
}

// On this page: mark the section that is being read ----------------------------------------------------------------

const entries = new Map($$('.toc a').map(a => [decodeURIComponent(a.hash.slice(1)), a]))

function markSection() {
  let current = null
  for (const id of entries.keys()) {
    const target = document.getElementById(id)
    if (target && target.getBoundingClientRect().top < innerHeight * 0.28) current = id
  }
  for (const [id, link] of entries) {
    if (id === current) link.setAttribute('aria-current', 'true')
    else link.removeAttribute('aria-current')
  }
}

if (entries.size) {
  let waiting = false
  addEventListener('scroll', () => {
    if (waiting) return
    waiting = true
    requestAnimationFrame(() => { waiting = false; markSection() })
  }, { passive: true })
  markSection()
}

// The drawer -------------------------------------------------------------------------------------------------------

const drawer = $('#nav-open')
drawer.addEventListener('change', () => { if (drawer.checked) $('nav.book a').focus() })
addEventListener('keydown', event => {
  if (event.key === 'Escape' && drawer.checked) { drawer.checked = false; drawer.focus() }
})
for (const place of [$('.page'), ...$$('nav.book a[href^="#"]')]) place.addEventListener('click', () => { drawer.checked = false })
$('nav.book [aria-current]')?.scrollIntoView({ block: 'nearest' })

// The story of the front page: written a word at a time. All its words stand there from the beginning, in two spans, so that
// nothing moves and a screen reader reads the whole -----------------------------------------------------------------------

function tellStory(story) {
  const words = story.lastChild.textContent.match(/\s*\S+/g)
  const [written, ahead] = ['written', 'ahead'].map(name => Object.assign(document.createElement('span'), { className: name }))
  const button = Object.assign(document.createElement('button'), { type: 'button', className: 'button' })
  let timer, shown

  function show(count) {
    clearTimeout(timer)
    shown = count
    written.textContent = words.slice(0, count).join('')
    ahead.textContent = words.slice(count).join('')
    button.textContent = count < words.length ? 'Show all' : 'Write it again'
    if (count < words.length) timer = setTimeout(show, 120, count + 1)
  }

  story.lastChild.replaceWith(written, ahead)
  story.parentElement.append(button)
  button.addEventListener('click', () => show(shown < words.length ? words.length : 0))
  show(matchMedia('(prefers-reduced-motion: reduce)').matches ? words.length : 0)
}

$$('.story > p:first-child').forEach(tellStory)

// What has been read: a list of pages that only this browser knows ----------------------------------------------------

const markButton = $('.mark-read'), home = new URL(root || './', location.href).pathname
const pageOf = address => address.pathname.slice(home.length).replace(/\.html$/, '')
let read = new Set()

function recall() {
  try { read = new Set(JSON.parse(localStorage.getItem('read') ?? '[]')) } catch { /* a private window forgets */ }
  showRead()
}

function toggleRead() {
  if (!read.delete(pageOf(location))) read.add(pageOf(location))
  try { localStorage.setItem('read', JSON.stringify([...read])) } catch { /* known until the page is left */ }
  showRead()
}

function showRead() {
  for (const link of $$('nav.book a:not([href^="#"]), .path li a')) link.classList.toggle('read', read.has(pageOf(link)))
  for (const time of $$('.path-time')) time.lastElementChild.textContent = remaining($$('li[data-minutes]', time.parentElement))
  markButton?.setAttribute('aria-pressed', read.has(pageOf(location)))
}

function remaining(steps) {
  const ahead = steps.filter(step => !$('a.read', step))
  const minutes = ahead.reduce((sum, step) => sum + Number(step.dataset.minutes), 0)
  return ahead.length === steps.length ? '' : ahead.length ? ` ${spoken(minutes)} left.` : ' All read.'
}

// A time as the builder says it (tools/paths.py).
function spoken(minutes) {
  const halves = Math.round(minutes / 30)
  if (minutes >= 90) return `${Math.floor(halves / 2)}${halves % 2 ? '½' : ''} hours`
  const rounded = minutes < 10 ? minutes : 5 * Math.round(minutes / 5)
  return `${rounded} minute${rounded === 1 ? '' : 's'}`
}

if (markButton) {
  markButton.hidden = false
  markButton.addEventListener('click', toggleRead)
}
addEventListener('storage', recall)             // marked in another window
addEventListener('pageshow', recall)            // and where the reader comes back to this one

// Search -----------------------------------------------------------------------------------------------------------

const dialog = $('dialog.search'), field = $('input[type=search]', dialog), list = $('.search-results'), note = $('.search-note')
const searchButton = $('.search-open')
let loading, asked = 0

async function load() {
  const pagefind = await import(new URL(root + 'pagefind/pagefind.js', location.href).href)
  const glossary = fetch(root + 'assets/terms.json').then(answer => answer.json()).catch(() => [])
  await pagefind.options({ excerptLength: 24 })
  await pagefind.init()
  return { pagefind, terms: await glossary }
}

const engine = () => loading ??= load()

async function openSearch() {
  if (dialog.open) return field.select()
  dialog.showModal()
  field.focus()
  try { await engine() } catch {
    note.textContent = location.protocol === 'file:'
      ? 'Search needs the book to be served: run “make serve” and open the address it prints. Everything else works from this folder.'
      : 'The search index could not be loaded.'
  }
}

function entry(url, title, excerpt, inside) {
  const item = document.createElement('li')
  const link = document.createElement('a')
  if (inside) item.className = 'inside'
  link.href = url
  link.append(Object.assign(document.createElement('b'), { textContent: title }))
  link.append(Object.assign(document.createElement('span'), { innerHTML: excerpt }))  // Pagefind escapes all but <mark>
  link.addEventListener('click', () => dialog.close())
  item.append(link)
  return item
}

// Definitions come first: of the term that was typed, or else of the first that begin so or have such a word.
const alike = name => name.toLowerCase().replace(/’/g, "'").replace(/[\s-]+/g, ' ').replace(/s\b/g, '')

function defined(terms, words) {
  const wanted = alike(words)
  const those = fits => terms.filter(term => term.names.some(name => fits(alike(name))))
  const exact = those(name => name === wanted)
  if (exact.length || wanted.length < 3) return exact
  return [...new Set([...those(name => name.startsWith(wanted)), ...those(name => name.includes(' ' + wanted))])].slice(0, 3)
}

function definition(term) {
  const item = entry(root + term.home, term.names[0], '', false)
  item.className = 'definition'
  $('b', item).append(Object.assign(document.createElement('small'), { textContent: `defined in ${term.section}` }))
  $('span', item).textContent = term.sentence
  return item
}

// The share of the words that a title has.
function share(title, words) {
  const wanted = words.toLowerCase().split(/\s+/)
  return wanted.filter(word => title.toLowerCase().includes(word)).length / wanted.length
}

// What a section is called: its anchor often has the field's word where its title has a plain one.
const name = part => `${part.title} ${part.url.split('#')[1] ?? ''}`

// How well a section answers: the words it marks, in prose rather than in code, and above all those in its name.
const isCode = text => /\w\(| = |->|==/.test(text.replace(/<\/?mark>/g, '').replace(/&gt;/g, '>'))
const weight = (part, words) => part.excerpt.split('<mark>').length / (isCode(part.excerpt) ? 3 : 1) + 9 * words.split(/\s+/).length * share(name(part), words)

// How well a page answers. Pagefind counts words; whoever types the title of a chapter or of a section wants to go there.
const rank = (page, words) => Math.max(2 * share(page.meta.title, words), ...page.sub_results.map(part => share(name(part), words)))

// The best page first; of two whose names answer alike, the earlier in the book.
function sorted(pages, words) {
  const order = $$('nav.book a').map(link => link.pathname)
  const keys = new Map(pages.map(page => [page, rank(page, words)]))
  const place = page => keys.get(page) ? order.indexOf(new URL(page.url, location.href).pathname) : 0
  return pages.sort((one, other) => keys.get(other) - keys.get(one) || place(one) - place(other))
}

function showResult(result, words) {
  const parts = result.sub_results.filter(part => part.url.includes('#') && part.title !== result.meta.title)
  parts.sort((one, other) => weight(other, words) - weight(one, words))
  const items = [entry(result.url, result.meta.title, parts.length ? '' : result.excerpt, false)]
  return items.concat(parts.slice(0, 3).map(part => entry(part.url, part.title, part.excerpt, true)))
}

// Pagefind shortens a word until it finds something; what shares less than its first letters with the word is no answer.
function answers(result, words) {
  const marked = [result, ...result.sub_results].flatMap(part => [...part.excerpt.matchAll(/<mark>(.*?)<\/mark>/g)].map(m => m[1].toLowerCase()))
  return words.toLowerCase().split(/[\s/]+/).some(word => marked.some(mark => mark.includes(word.slice(0, 4))))
}

const pause = ms => new Promise(done => setTimeout(done, ms))

async function search() {
  const turn = ++asked, words = field.value.trim()
  if (!words) { list.replaceChildren(); note.textContent = ''; return }
  await pause(120)                                // whoever is still typing asks again
  if (turn !== asked) return
  const { pagefind, terms } = await engine()
  const found = await pagefind.search(words)
  const pages = await Promise.all(found.results.slice(0, 40).map(result => result.data()))
  if (turn !== asked) return
  const results = sorted(pages.filter(page => answers(page, words)), words).slice(0, 10)
  list.replaceChildren(...defined(terms, words).map(definition), ...results.flatMap(result => showResult(result, words)))
  const count = results.length
  note.textContent = count ? `${count} page${count > 1 ? 's' : ''}` : `Nothing found for “${words}”`
}

function moveFocus(event) {
  const stops = [field, ...$$('a', list)]
  const step = { ArrowDown: 1, ArrowUp: -1 }[event.key]
  if (event.key === 'Enter' && document.activeElement === field) { event.preventDefault(); stops[1]?.click() }
  if (!step) return
  event.preventDefault()
  stops[(stops.indexOf(document.activeElement) + step + stops.length) % stops.length].focus()
}

searchButton.hidden = false
searchButton.addEventListener('click', openSearch)
field.addEventListener('input', () => search().catch(() => {}))
dialog.addEventListener('keydown', moveFocus)
dialog.addEventListener('click', event => { if (event.target === dialog) dialog.close() })
addEventListener('keydown', event => {
  const typing = event.target.closest?.('input, textarea, select, [contenteditable]')
  const plain = !event.ctrlKey && !event.metaKey && !event.altKey
  const wanted = (plain && !typing && (event.key === '/' || event.key === 's')) || ((event.ctrlKey || event.metaKey) && event.key === 'k')
  if (wanted) { event.preventDefault(); openSearch() }
})
